"""The table in the docs says what the matrix tries."""

from __future__ import annotations

from table import DOCUMENT, render


def test_the_table_is_current() -> None:
    assert DOCUMENT.read_text() == render(), "run: python tests/conformance/table.py"
