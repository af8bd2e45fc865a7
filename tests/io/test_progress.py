"""The one progress bar, and what stands beside it for each kind of work."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import lorafast
import pytest
from lorafast._fleet.progress import Follow, follower
from lorafast._io.progress import Report, callback, pace
from support.handmade import make_adapter, make_base


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")


@contextmanager
def terminal() -> Iterator[Terminal]:
    """A terminal in the place of standard error, within a test: pytest has its own between them."""
    own = Terminal()
    with redirect_stderr(own):
        yield own


def test_bytes_stand_beside_the_bar() -> None:
    with terminal() as shown, callback(True, label="merging") as report:
        assert report is not None
        report(5_000_000, 10_000_000)
    assert "merging" in shown.getvalue()
    assert "5.0/10.0 MB" in shown.getvalue()


def test_a_person_counts_in_units_of_his_own() -> None:
    with terminal() as shown, pace(True, "comparing", 40, "pairs") as report:
        assert report is not None
        report(500, 1000)
    assert "comparing" in shown.getvalue()
    assert "20 of 40 pairs" in shown.getvalue()
    with terminal() as shown, pace(True, "reading", 4, "adapters", is_bytes=True) as report:
        assert report is not None
        report(0, 0)
        report(10, 10)
    assert "4 of 4 adapters" in shown.getvalue()
    assert "GB/s" in shown.getvalue()


def test_a_scan_shows_adapters_and_bytes_of_all_its_parts() -> None:
    with terminal() as shown, follower(True) as follow:
        follow.begin(12)
        follow.read(50, 100)
        follow.finished(3)
        follow.end_of_part()
        follow.read(100, 100)
    assert "scanning" in shown.getvalue()
    assert "looking for adapters" in shown.getvalue()
    assert "3 of 12 adapters" in shown.getvalue()


def test_a_callable_hears_of_it_and_nobody_of_silence() -> None:
    heard: list[tuple[int, int]] = []

    def hear(done: int, total: int) -> None:
        heard.append((done, total))

    with terminal() as shown:
        with follower(hear) as follow:
            follow.read(0, 0)
            follow.read(50, 100)
            follow.end_of_part()
            follow.read(20, 40)
        assert heard == [(50, 100), (120, 140)]
        with pace(hear, "comparing", 1, "pairs") as report:
            assert report is hear
        with follower(False) as follow:
            assert type(follow) is Follow
        with callback(False) as report:
            assert report is None
    assert shown.getvalue() == ""


def test_no_bar_is_drawn_into_a_file() -> None:
    shown = io.StringIO()
    with redirect_stderr(shown), callback(True) as report:
        assert report is not None
        # A line comes when ten seconds have passed.
        for done in range(10):
            report(done, 10)
    assert shown.getvalue() == ""


class Shell:
    """What IPython's `get_ipython` gives: a kernel's shell, or one of a terminal."""

    def __init__(self, *, kernel: bool) -> None:
        if kernel:
            self.kernel = object()


class Cell:
    """The output of a notebook's cell, as `IPython.display` writes it."""

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def display(self, data: dict[str, str], *, raw: bool, display_id: bool) -> Cell:
        assert raw
        assert display_id
        self.shown.append(data)
        return self

    def update(self, data: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.shown.append(data)


@contextmanager
def notebook(monkeypatch: pytest.MonkeyPatch, *, kernel: bool = True) -> Iterator[Cell]:
    cell, ipython, display = Cell(), ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: Shell(kernel=kernel)  # type: ignore[attr-defined]  # a module made here
    display.display = cell.display  # type: ignore[attr-defined]  # a module made here
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("lorafast._io.notebook_bar.SECONDS_A_PICTURE", 0.0)
    yield cell


def _fail(report: Report | None) -> None:
    """Half of some work, and its end."""
    assert report is not None
    report(1, 2)
    report(1, 0 // 0)


def test_a_notebook_has_a_bar_in_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    error = io.StringIO()
    with notebook(monkeypatch) as cell, redirect_stderr(error):
        with callback(True, label="<merging>") as report:
            assert report is not None
            report(0, 4_000_000_000)
            report(1_000_000_000, 4_000_000_000)
        with pytest.raises(ZeroDivisionError), callback(True, label="verifying") as report:
            _fail(report)
        with pace(True, "comparing", 40, "pairs") as report:
            assert report is not None
            report(500, 1000)
        with follower(True) as follow:
            follow.begin(12)
            follow.read(50, 100)
    assert error.getvalue() == ""
    texts = [shown["text/plain"] for shown in cell.shown]
    assert texts[0] == "<merging>:"
    assert "<merging>: 25% 1.0 of 4.0 GB" in texts
    assert texts[3].startswith("<merging>: 100% 4.0 of 4.0 GB · ")
    assert "verifying: 50% stopped" in texts
    assert any(text.startswith("comparing: 50% 20 of 40 pairs") for text in texts)
    assert "scanning: looking for adapters" in texts
    for shown in cell.shown:
        ElementTree.fromstring(shown["text/html"])
    assert '<progress max="1" value="0.250"></progress>' in cell.shown[2]["text/html"]


def test_a_notebook_draws_few_pictures_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    with notebook(monkeypatch) as cell:
        monkeypatch.setattr("lorafast._io.notebook_bar.SECONDS_A_PICTURE", 60.0)
        with callback(True) as report:
            assert report is not None
            for done in range(1000):
                report(done, 1000)
    assert len(cell.shown) == 2


def test_ipython_on_a_terminal_has_the_terminals_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        notebook(monkeypatch, kernel=False) as cell,
        terminal() as shown,
        callback(True, label="merging") as report,
    ):
        assert report is not None
        report(5, 10)
    assert cell.shown == []
    assert "merging" in shown.getvalue()


def test_a_merge_in_a_notebook_shows_its_bar(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    with notebook(monkeypatch) as cell:
        lorafast.merge(base, adapter, tmp_path / "silent")
        assert cell.shown == []
        lorafast.merge(base, adapter, tmp_path / "out", progress=True)
    assert cell.shown[-1]["text/plain"].startswith("merging: 100%")
