"""Where PEFT's merge is not what was trained: the one by default, the other under compat="peft"."""

from __future__ import annotations

from pathlib import Path

import lorafast
import numpy as np
import pytest
from matrix import lora
from support.files import read_checkpoint
from support.models import Models, state
from toys import Toys, merge_with_peft


@pytest.fixture
def toys(models: Models) -> Toys:
    return Toys(models)


ALL = ("lin0", "lin1", "emb", "conv1d", "convolution2")
SEVERAL = {
    "two": (lora(*ALL, use_dora=True), lora(*ALL, use_dora=True, r=3)),
    "plain, then DoRA": (lora(*ALL), lora(*ALL, use_dora=True, r=3)),
    "DoRA, then plain": (lora(*ALL, use_dora=True), lora(*ALL, r=3)),
    "three": (
        lora(*ALL, use_dora=True),
        lora("lin0", "emb", "conv1d", r=3),
        lora(*ALL, use_dora=True, use_rslora=True, r=5),
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_dora_adapters(toys: Toys, tmp_path: Path, name: str) -> None:
    base = toys.base("layers")
    adapters = [
        toys.adapter(f"compat-{name}-{number}".replace(" ", "_"), base, dict(settings), seed=number)
        for number, settings in enumerate(SEVERAL[name])
    ]
    lorafast.merge(base, adapters, tmp_path / "out", compat="peft")
    ours = read_checkpoint(tmp_path / "out")
    theirs = state(merge_with_peft(base, adapters))
    changed = 0
    for key, before in read_checkpoint(base).items():
        expected = theirs[key].float64()
        changed += not np.array_equal(expected, before.float64())
        error = np.abs(ours[key].float64() - expected).max()
        assert error <= 1e-6 * max(1.0, np.abs(expected).max()), key
    assert changed >= len(ALL)
    checked = lorafast.verify(base, adapters, tmp_path / "out", full=True, compat="peft")
    assert checked.ok, checked.problems
    # By default each adapter is what it was alone, and the two are told apart.
    differs = name != "DoRA, then plain"
    assert lorafast.verify(base, adapters, tmp_path / "out").ok is not differs
