"""Seeds that are none, wherever a seed is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._cli.main import main
from support.dense_methods import toys
from support.handmade import make_adapter, make_base

ASKED: dict[str, Any] = {"strategy": "dare_linear", "strategy_options": {"density": 0.5}}


def combine(folder: Path, seed: Any) -> object:
    method: dict[str, Any] = {"method": "dare_linear", "options": {"density": 0.5}, "rank": 2}
    return lorafast.combine(toys(folder, "PQ"), folder / "out", seed=seed, **method)


def extract(folder: Path, seed: Any) -> object:
    models = [make_base(folder / name, seed=number) for number, name in enumerate("ab")]
    return lorafast.extract(*models, folder / "out", rank=2, seed=seed)


def merge(folder: Path, seed: Any) -> object:
    base, adapter = make_base(folder / "base"), make_adapter(folder / "adapter")
    return lorafast.merge(base, adapter, folder / "out", seed=seed, **ASKED)


def plan(folder: Path, seed: Any) -> object:
    base, adapter = make_base(folder / "base"), make_adapter(folder / "adapter")
    return lorafast.plan(base, adapter, seed=seed, **ASKED)


def verify(folder: Path, seed: Any) -> object:
    base, adapter = make_base(folder / "base"), make_adapter(folder / "adapter")
    lorafast.merge(base, adapter, folder / "merged", seed=3, **ASKED)
    return lorafast.verify(base, adapter, folder / "merged", seed=seed, **ASKED)


VERBS = [combine, extract, merge, plan, verify]
WANTED = r"; it is a whole number from 0 to 2\*\*64 - 1$"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("seed", [-1, 2**64, np.int64(-1)])
def test_seeds_out_of_range_are_refused(
    tmp_path: Path, verb: Callable[[Path, Any], object], seed: Any
) -> None:
    with pytest.raises(ValueError, match=f"^seed is {int(seed)}{WANTED}"):
        verb(tmp_path, seed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("seed", [1.5, "3", None, True])
def test_what_is_no_whole_number_is_refused(
    tmp_path: Path, verb: Callable[[Path, Any], object], seed: Any
) -> None:
    with pytest.raises(TypeError, match=f"^seed is {seed!r}{WANTED}"):
        verb(tmp_path, seed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("seed", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers_of_any_type_are_seeds(
    tmp_path: Path, verb: Callable[[Path, Any], object], seed: Any
) -> None:
    verb(tmp_path, seed)


@pytest.mark.parametrize("command", ["combine", "extract", "merge"])
def test_commands_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    models = [str(make_base(tmp_path / name, seed=number)) for number, name in enumerate("ab")]
    adapters = list(map(str, toys(tmp_path, "PQ")))
    inputs = {
        "combine": [*adapters, "--method", "dare_linear", "--rank", "2"],
        "extract": [*models, "--rank", "2"],
        "merge": ["-b", models[0], "-a", *adapters, "--strategy", "dare_linear"],
    }[command]
    assert main([command, *inputs, "-o", str(tmp_path / "out"), "--seed", "-1"]) == 1
    assert "seed is -1; it is a whole number from 0 to 2**64 - 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
