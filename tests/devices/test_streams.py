"""File merges on the simulated device: the right numbers, everything in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._torch import file_merge
from support.device_merges import WAYS, Inputs, Way, go, inputs
from support.files import read_checkpoint
from support.mutants import Statement, ordering_statements, without

NAMES = list(WAYS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Inputs]:
    return {name: inputs(tmp_path_factory.mktemp("way"), way) for name, way in WAYS.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_way_is_in_order(name: str, made: dict[str, Inputs], tmp_path: Path) -> None:
    way, files = WAYS[name], made[name]
    simulator, report = go(way, files, tmp_path / "out")
    assert simulator.checker.problems == []
    # The checker has seen the pool's threads at work, and not only the streams.
    assert simulator.checker.accesses["host writes"] >= 3
    if report is None:
        assert not (tmp_path / "out").exists()
        return
    assert report.device == "cuda:0 (Simulated GPU)"
    assert sum(len(names) for names in report.fallbacks.values()) == way.leaves
    assert simulator.checker.accesses["host reads"] >= 2
    assert simulator.allocated == 0
    lorafast.merge(files.base, files.adapters, tmp_path / "cpu", compat=way.options.get("compat"))
    ours, cpu = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "cpu")
    assert ours.keys() == cpu.keys()
    for key, value in cpu.items():
        tolerance = {"BF16": 2.0**-8, "F16": 2.0**-10, "F32": 2.0**-20, "F64": 2.0**-50}
        error = np.abs(ours[key].float64() - value.float64())
        assert error.max() <= tolerance[value.dtype] * np.abs(value.float64()).max(), key


# The first that needs a statement, for each one; other ways are tried if it does not.
STATEMENTS = ordering_statements(file_merge)


def fails(way: Way, files: Inputs, output: Path, mutant: Any) -> bool:
    try:
        simulator, _ = go(way, files, output, module=mutant)
    except (lorafast.LorafastError, pytest.fail.Exception):
        return True
    return bool(simulator.checker.problems)


def test_there_are_statements_that_order() -> None:
    texts = [statement.text for statement in STATEMENTS]
    for kind in ("wait_stream", "record_stream", "synchronize", "record_event"):
        assert any(f".{kind}(" in text for text in texts), kind


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda each: each.text)
def test_no_order_is_there_for_nothing(
    statement: Statement, made: dict[str, Inputs], tmp_path: Path
) -> None:
    mutant = without(file_merge, statement)
    short = ["interrupted", "fused", "one row without room", "DoRA of columns"]
    tried = (fails(WAYS[name], made[name], tmp_path / name, mutant) for name in short)
    assert any(tried), f"nothing is found without {statement.text}"
