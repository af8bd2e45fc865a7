"""Seeds and counts from the environment, and the line of figures that a program prints."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

SEED = int(os.environ.get("LORAFAST_TRUST_SEED", "0"))
#: Wrong outcomes that are described in the failure; all are counted.
DESCRIBED = int(os.environ.get("LORAFAST_TRUST_DESCRIBED", "8"))


def count(program: str, short: int) -> int:
    """How often a program tries.

    LORAFAST_TRUST_<PROGRAM>, or else LORAFAST_TRUST_COUNT, or else `short`, which continuous
    integration can afford.
    """
    everywhere = os.environ.get("LORAFAST_TRUST_COUNT", str(short))
    return int(os.environ.get(f"LORAFAST_TRUST_{program.upper()}", everywhere))


def generator(program: str) -> random.Random:
    """A program's own source of chance, the same for the same seed."""
    return random.Random(f"{SEED} {program}")


class Figures:
    """What a program counts, and whatever came out wrong."""

    def __init__(self, program: str, say: Callable[[str], None]) -> None:
        self.program = program
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._say = say
        self._start = time.monotonic()

    def add(self, *names: str) -> None:
        """Count one of each."""
        self.counts.update(names)

    def expect(self, condition: object, problem: str) -> bool:
        """Take note of a problem unless the condition holds."""
        if not condition:
            self.wrong.append(problem)
        return bool(condition)

    def check(self, problems: list[str], where: str) -> None:
        """Take note of each problem, and of where it was met."""
        self.wrong += [f"{where}: {problem}" for problem in problems]

    def line(self) -> str:
        counted = ", ".join(f"{name} {number}" for name, number in self.counts.items())
        seconds = time.monotonic() - self._start
        return (
            f"trust: {self.program}: {counted}, wrong {len(self.wrong)} "
            f"(seed {SEED}, {seconds:.0f} s)"
        )

    def settle(self) -> None:
        """Print the figures, and fail if anything was wrong.

        Where LORAFAST_TRUST_FIGURES names a file, the line is appended to it.
        """
        line = self.line()
        self._say(line)
        if kept := os.environ.get("LORAFAST_TRUST_FIGURES"):
            with Path(kept).open("a") as file:
                file.write(line + "\n")
        if self.wrong:
            described = "\n  ".join(self.wrong[:DESCRIBED])
            rest = len(self.wrong) - DESCRIBED
            more = f"\n  and {rest} more" if rest > 0 else ""
            pytest.fail(f"{line}\n  {described}{more}", pytrace=False)
