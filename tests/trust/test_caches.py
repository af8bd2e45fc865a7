"""Caches that were cut off, written over, locked, taken away or made by another version."""

from __future__ import annotations

import contextlib
import os
import random as chance
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

from support.handmade import adapter_tensors, make_adapter
from support.trust.command import Outcome, Running, lorafast, shortened
from support.trust.figures import Figures, count, generator

Poison = Callable[[Path, chance.Random], None]


def cut_off(path: Path, random: chance.Random) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


def empty(path: Path, random: chance.Random) -> None:
    path.write_bytes(b"")


def random_bytes(path: Path, random: chance.Random) -> None:
    path.write_bytes(random.randbytes(random.choice((10, path.stat().st_size))))


def some_bytes(path: Path, random: chance.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(random.choice((1, 10, 100))):
        content[random.randrange(len(content))] = random.randrange(256)
    path.write_bytes(content)


def directory(path: Path, random: chance.Random) -> None:
    path.unlink()
    path.mkdir()
    (path / "mine").write_text("x")


def pipe(path: Path, random: chance.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def read_only(path: Path, random: chance.Random) -> None:
    path.chmod(0o444)


def rows(path: Path, random: chance.Random) -> None:
    """Values of other types, lengths and encodings in every row."""
    if path.suffix != ".sqlite":
        return some_bytes(path, random)
    with sqlite3.connect(path) as database:
        (table,) = database.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name = 'found'"
        ).fetchone()
        for column in ("details", "cells"):
            value = random.choice(
                (b"", b"\x00", random.randbytes(50), 7, 1.5, "text", "\udc80", None, b"x\x9c\xff")
            )
            try:
                database.execute(f"UPDATE {table} SET {column} = ?", (value,))
            except (sqlite3.Error, UnicodeError):
                database.execute(f"UPDATE {table} SET {column} = x'00'")
    database.close()
    return None


def future(path: Path, random: chance.Random) -> None:
    """What a later version may have made of it."""
    if path.suffix != ".sqlite":
        return random_bytes(path, random)
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version = {random.randrange(1, 1 << 30)}")
        database.execute("DROP TABLE found")
        database.execute("CREATE TABLE found (other TEXT)")
    database.close()
    return None


POISONS: list[Poison] = [
    cut_off, empty, random_bytes, some_bytes, directory, pipe, read_only, rows, future
]  # fmt: skip


def test_a_poisoned_cache_changes_no_result(
    tmp_path: Path, figures: Callable[[str], Figures]
) -> None:
    """It is made again, or refused in one line; what it would have saved is found again."""
    told = figures("caches")
    random = generator("caches")
    fleet = tmp_path / "fleet"
    for number in range(4):
        made = make_adapter(fleet / f"a{number}", adapter_tensors(seed=number))
        for file in made.iterdir():
            # What changed a moment ago is not kept.
            os.utime(file, (1_600_000_000, 1_600_000_000))
    commands = {"scan": ["scan", fleet, "--json"], "similarity": ["similarity", fleet, "--json"]}
    right: dict[str, str] = {}
    saved = {}
    for name, command in commands.items():
        plain = lorafast(*command)
        assert plain.code == 0, plain.err
        right[name] = plain.out
        saved[name] = tmp_path / f"saved-{name}"
        cached = lorafast(*command, "--cache", saved[name])
        assert (cached.code, cached.out) == (0, plain.out), cached.err
    place = tmp_path / "cache"

    def judge(name: str, outcome: Outcome, where: str) -> None:
        told.check(outcome.problems(0, 1), where)
        told.add("done" if outcome.code == 0 else "refused")
        if outcome.code == 0:
            told.expect(outcome.out == right[name], f"{where}: another result")
        else:
            told.expect(str(place) in outcome.err, f"{where}: {shortened(outcome.err)}")

    for number in range(count("caches", 9)):
        poison = POISONS[number % len(POISONS)]
        name = random.choice(("scan", "scan", "similarity"))
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(saved[name], place)
        files = sorted(p for p in place.rglob("*") if p.is_file())
        poison(random.choice(files), random)
        where = f"{number}: {name}, {poison.__name__}"
        first = lorafast(*commands[name], "--cache", place, limit=20)
        judge(name, first, where)
        judge(name, lorafast(*commands[name], "--cache", place, limit=20), f"{where}, again")
    told.settle()


def test_a_locked_cache_costs_no_work(tmp_path: Path, figures: Callable[[str], Figures]) -> None:
    """Another program holds it, for a while or for ever: results are not lost."""
    told = figures("locked caches")
    adapter = make_adapter(tmp_path / "a")
    place = tmp_path / "cache"
    assert lorafast("scan", adapter, "--cache", place).code == 0
    for seconds in (2, 60)[: count("locked_caches", 1)]:
        database = sqlite3.connect(next(place.glob("*.sqlite")), isolation_level=None)
        database.execute("BEGIN EXCLUSIVE")
        running = Running(["scan", adapter, "--cache", place, "--json"])
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.process.wait(seconds)
        database.execute("ROLLBACK")
        database.close()
        outcome = running.finish()
        told.add("locked")
        codes = (0,) if seconds < 10 else (0, 1)
        told.check(outcome.problems(*codes), f"locked for {seconds} s")
        if outcome.code == 1:
            told.expect(outcome.seconds < 45, f"waited {outcome.seconds:.0f} s and gave up")
            told.expect(str(place) in outcome.err, f"does not name the cache: {outcome.last}")
    told.settle()
