"""Numbers and values as people read them: the one place where figures become text."""

from __future__ import annotations

import math

# Not `typing`'s, whose import takes longer than this module's: a merge writes its report by it.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

#: Stands where there is no number.
ABSENT = "–"
#: Said of a comparison of many adapters.
NO_PAIRS = (
    "The updates of single modules were not compared; that is done for up to ten adapters, and "
    "for more with --modules, or modules=True in Python."
)


def format_number(value: float | None, digits: int = 4, *, nan: str = ABSENT) -> str:
    """A number in significant digits.

    Args:
        value: the number; a dash stands for `None`.
        digits: how many significant digits.
        nan: what stands for NaN.
    """
    if value is None:
        return ABSENT
    if math.isnan(value):
        return nan
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    # With z, what rounds to zero has no minus.
    return f"{value:z.{digits}g}"


def format_cosine(value: float | None) -> str:
    """A cosine in four decimals; a dash where there is none."""
    return ABSENT if value is None or math.isnan(value) else f"{value:z.4f}"


def format_range(values: Iterable[float]) -> str:
    """One number, or the least and the greatest of several."""
    ordered = sorted(set(values))
    if not ordered:
        return ABSENT
    ends = ordered[:1] if len(ordered) == 1 else [ordered[0], ordered[-1]]
    return " – ".join(map(format_number, ends))


def format_options(options: Mapping[str, Any]) -> str:
    """Options and their values, as the command and YAML write them."""
    shown = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in options.items()
    }
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def format_percent(share: float) -> str:
    """A share as a percentage that neither rounds to nothing nor to all."""
    value = 100 * share
    return f"{value:.3g} %" if value < 99.9 or value == 100 else f"{value:.6g} %"


def format_residual(share: float) -> str:
    """A share that should be next to nothing, as a percentage with two digits that count."""
    if share < 1e-6:
        return f"{share:.0e}" if share else "0 %"
    return f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.3g} %"


def format_value(value: Any) -> str:
    """A value as a reader would write it: whole numbers in full, others in significant digits."""
    if isinstance(value, dict):
        items = [f"{key} (×{format_value(count)})" for key, count in value.items()]
        return ", ".join(items) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(format_value, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if value is None or isinstance(value, float):
        return format_number(value, nan="NaN")
    return str(value)
