"""Figures that are printed whatever pytest captures, and a mark for everything in this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.trust import injection
from support.trust.figures import Figures

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.trust)


@pytest.fixture
def figures(capsys: pytest.CaptureFixture[str]) -> Callable[[str], Figures]:
    """Makes a program's figures."""

    def say(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}", end=" ", flush=True)

    return lambda program: Figures(program, say)


@pytest.fixture
def strace() -> None:
    """Skips a program where faults cannot be injected."""
    if reason := injection.why_not():
        pytest.skip(reason)
