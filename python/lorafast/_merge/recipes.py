"""What the report beside a model says of its shards, for a merge that writes over it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lorafast._errors import LorafastError
from lorafast._io.paths import open_plain

#: The report that has them.
REPORT = "merge_report.json"
#: A report is some megabytes long at most.
LONGEST = 256 << 20
#: What is said of a shard's file, and of what rounding took away in it.
OF_FILE = ("bytes", "inode", "modified", "changed")
SUMS, COUNTS = ("error", "change"), ("moving", "unmoved", "values")


def earlier(output: str) -> dict[str, Any]:
    """The recipes of the shards in an output, by their names; none where nothing tells of them.

    Anybody may have changed the report. What it says of a file is held against the file by the
    core; what is no recipe is left out here.
    """
    try:
        with open_plain(Path(output) / REPORT) as file:
            report = json.loads(file.read(LONGEST))
    except (LorafastError, OSError, ValueError, RecursionError):
        return {}
    recipes = report.get("recipes") if isinstance(report, dict) else None
    if not isinstance(recipes, dict):
        return {}
    return {name: entry for name, entry in recipes.items() if _is_recipe(entry)}


def _is_recipe(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"recipe", "file", "rounding"}:
        return False
    file, sums = entry["file"], entry["rounding"]
    return (
        isinstance(entry["recipe"], str)
        and _has(file, OF_FILE)
        and isinstance(sums, dict)
        and sums.keys() == {*SUMS, *COUNTS}
        and _has({name: sums[name] for name in COUNTS}, COUNTS)
        and all(type(sums[name]) in (int, float) and math.isfinite(sums[name]) for name in SUMS)
    )


def _has(entry: Any, names: tuple[str, ...]) -> bool:
    """Whether a mapping has whole numbers under these names, and nothing else."""
    return (
        isinstance(entry, dict)
        and entry.keys() == set(names)
        and all(type(value) is int and 0 <= value < 1 << 64 for value in entry.values())
    )
