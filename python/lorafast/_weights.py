"""Weights of adapters: a number, or numbers by patterns of module names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorafast._types import Weight


def weight_of(text: str) -> Weight:
    """The weight that a text says: `0.7`, or `*.q_proj=0.5,*=1`.

    Raises:
        ValueError: it says none.
    """
    if "=" not in text:
        return _number(text, text)
    found = {}
    for part in text.split(","):
        pattern, _, number = part.rpartition("=")
        if not pattern:
            raise ValueError(f"{part!r} in {text!r} is not PATTERN=NUMBER")
        found[pattern] = _number(number, text)
    return found


def plain_weight(weight: Weight) -> float | dict[str, float]:
    """A weight as JSON has it."""
    if isinstance(weight, Mapping):
        return {str(pattern): float(number) for pattern, number in weight.items()}
    return float(weight)


def weight_text(
    weight: Weight, number: Callable[[float], str], pattern: Callable[[str], str] = str
) -> str:
    """A weight in words: `0.7`, or `*.q_proj 0.5, * 1`.

    Args:
        weight: the weight.
        number: how numbers are written.
        pattern: how patterns are.
    """
    if not isinstance(weight, Mapping):
        return number(weight)
    return ", ".join(f"{pattern(each)} {number(value)}" for each, value in weight.items())


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"{whole!r} is no weight: it is a number, or PATTERN=NUMBER,… by module names"
        ) from None
