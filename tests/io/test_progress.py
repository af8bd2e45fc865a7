"""The one progress bar, and what stands beside it for each kind of work."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import pytest
from lorafast._fleet.progress import Follow, follower
from lorafast._io.progress import callback, pace


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
