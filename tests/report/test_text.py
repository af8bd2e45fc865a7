"""Numbers as text, and the cells of Markdown pages."""

from __future__ import annotations

import math
from typing import Any

import lorafast
import pytest
from lorafast._report import cells
from lorafast._report.merge import merge_page
from lorafast._report.text import (
    format_number,
    format_percent,
    format_range,
    format_residual,
    format_value,
)

ATTACK = "x|y`*_<script>\n# z\n| a | b |[l](u)\\|"


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (None, 4, "–"),
        (math.nan, 4, "–"),
        (math.inf, 4, "∞"),
        (-math.inf, 4, "−∞"),
        (0.123456, 4, "0.1235"),
        (0.123456, 6, "0.123456"),
        (16, 6, "16"),
    ],
)
def test_a_number_has_as_many_digits_as_asked(value: float | None, digits: int, text: str) -> None:
    assert format_number(value, digits) == text


def test_ranges_shares_and_values_are_written_for_reading() -> None:
    assert format_range([]) == "–"
    assert format_range([8, 8]) == "8"
    assert format_range([16, 8, 4]) == "4 – 16"
    assert format_percent(0.99999) == "99.999 %"
    assert format_percent(1.0) == "100 %"
    assert format_residual(0.0) == "0 %"
    assert format_residual(2e-7) == "2e-07"
    assert format_residual(0.00234) == "0.23 %"
    assert format_value({"8": 2, "16": 1}) == "8 (×2), 16 (×1)"
    assert format_value([]) == "none"
    assert format_value([True, 1234, None, 0.5]) == "yes, 1,234, –, 0.5"


def hostile(kind: str) -> Any:
    """A value of a field's type with what would be markup in every text of it."""
    if kind.startswith("str"):
        return ATTACK
    if kind.startswith("list[str]"):
        return [ATTACK, ATTACK]
    return 1.0 if kind == "float" else 3


def test_no_text_of_a_merges_report_is_markup() -> None:
    """Whatever field it stands in: rows keep their cells, and nothing begins a line of its own."""
    types = lorafast.MergeReport.__bases__[0].__annotations__
    values: dict[str, Any] = {
        name: hostile(types[name].__forward_arg__) for name in lorafast.MergeReport._fields
    }
    values |= {
        "weights": [1.0, 2.0],
        "strategy_options": {ATTACK: 1.0},
        "versions": {"lorafast": "1.0"},
        "adapters": [ATTACK, ATTACK + "2"],
        "adapter_sha256": {ATTACK: ATTACK, ATTACK + "2": "0"},
        "groups": [{"adapter": 0, "rank": 8, "scale": 2.0, "weight": 1.0, "modules": 3}],
        "coverage": [
            {
                "fields": [{"name": ATTACK, "use": "not_needed", "reason": ATTACK}],
                "tensors": [{"name": ATTACK, "use": "not_needed", "reason": ATTACK}],
                "files": [{"name": ATTACK, "use": "not_needed", "reason": ATTACK}] * 2,
            }
        ],
        "fallbacks": {ATTACK: [ATTACK]},
        "file_origins": {ATTACK: ATTACK},
        "sources": [{"role": "base", "name": ATTACK, "revision": ATTACK, "sha256": ATTACK}],
        "rounding": None,
        "verification": None,
    }
    page = merge_page(lorafast.MergeReport(**values))
    lines = page.splitlines()
    assert not any(line.lstrip().startswith(("# z", "| a | b")) for line in lines)
    assert "<script>" not in outside_code(page)
    columns = 0
    for line in lines:
        # Bars end cells in code, too, unless they are escaped.
        bare = line.replace("\\\\", "").replace("\\|", "")
        if line.startswith("|"):
            columns = columns or bare.count("|")
            assert bare.count("|") == columns, line
        else:
            columns = 0


def outside_code(text: str) -> str:
    """A text without what stands between backticks, each of which ends where it should."""
    parts = text.replace("\\`", "").split("`")
    assert len(parts) % 2 == 1
    return "".join(parts[::2])


def test_cells_break_no_table_and_start_no_formula() -> None:
    assert cells.table(["a", "b"], [["1", "2"]]) == ["| a | b |", "|---|---:|", "| 1 | 2 |"]
    assert cells.table(["a", "b"], [], right=False)[1] == "|---|---|"
    assert cells.csv_text("=1+1") == "'=1+1"
