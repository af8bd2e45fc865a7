"""What the report beside a model says of its shards, for a merge that writes over it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafast._errors import LorafastError
from lorafast._io.paths import open_plain

if TYPE_CHECKING:
    from lorafast import _core

#: The report that has them.
REPORT = "merge_report.json"
#: A report is some megabytes long at most.
LONGEST = 256 << 20
#: What is said of a shard's file.
OF_FILE = ("bytes", "inode", "modified", "changed")
#: Of what rounding took away in it: so many sums, and then so many counts.
SUMS, COUNTS = 2, 3


def earlier(output: str | _core.StoreLocation) -> dict[str, Any]:
    """The recipes of the shards in an output, by their names; none where nothing tells of them.

    Anybody may have changed the report. What it says of a file is held against the file by the
    core; what is no recipe is left out here.
    """
    try:
        if isinstance(output, str):
            with open_plain(Path(output) / REPORT) as file:
                report = json.loads(file.read(LONGEST))
        else:
            report = json.loads(output.read(REPORT))
    except (LorafastError, OSError, ValueError, RecursionError):
        return {}
    recipes = report.get("recipes") if isinstance(report, dict) else None
    if not isinstance(recipes, dict):
        return {}
    return {name: entry for name, entry in recipes.items() if _is_recipe(entry)}


def _is_recipe(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"recipe", "file", "rounding"}:
        return False
    file, rounding = entry["file"], entry["rounding"]
    return (
        isinstance(entry["recipe"], str)
        and _has(file, OF_FILE)
        and isinstance(rounding, list)
        and len(rounding) == SUMS + COUNTS
        and all(type(each) in (int, float) and math.isfinite(each) for each in rounding[:SUMS])
        and all(type(each) is int and 0 <= each < 1 << 64 for each in rounding[SUMS:])
    )


def _has(entry: Any, names: tuple[str, ...]) -> bool:
    """Whether a mapping has whole numbers under these names, and nothing else."""
    return (
        isinstance(entry, dict)
        and entry.keys() == set(names)
        and all(type(value) is int and 0 <= value < 1 << 64 for value in entry.values())
    )
