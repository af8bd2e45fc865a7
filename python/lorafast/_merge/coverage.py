"""What became of an adapter's parts, counted and in words: used, not needed, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafast._core import Coverage, Use

USES = {"used": "used", "not_needed": "not needed", "refused": "refused"}
#: The reason of fields that say nothing, which nobody wants to read one by one.
UNSET = "is not set"


def counts_text(entries: Sequence[Use]) -> str:
    """`54 used, 2 not needed`; uses that nothing has are left out."""
    counts = {words: sum(entry["use"] == use for entry in entries) for use, words in USES.items()}
    return ", ".join(f"{count:,} {words}" for words, count in counts.items() if count) or "none"


def summary_text(coverage: Coverage) -> str:
    """One line for tensors, config fields, and files where there is more than the adapter's."""
    tensors, fields = counts_text(coverage["tensors"]), counts_text(coverage["fields"])
    text = f"tensors: {tensors}; config fields: {fields}"
    files = coverage["files"]
    return f"{text}; files of weights: {counts_text(files)}" if len(files) > 1 else text


def left_over(coverage: Coverage) -> list[tuple[str, str, list[str]]]:
    """Whatever is not used, by use and reason: `(use in words, reason, names)`.

    Fields that are not set are left out.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in [*coverage["tensors"], *coverage["fields"], *coverage["files"]]:
        if entry["use"] != "used" and entry["reason"] != UNSET:
            key = (USES[entry["use"]], entry["reason"])
            groups.setdefault(key, []).append(entry["name"])
    return [(use, reason, names) for (use, reason), names in groups.items()]


def names_text(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, … ({len(names):,} in all)"
