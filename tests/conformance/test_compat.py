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
    # The same by default; weighted, each is made from the base alone.
    assert lorafast.verify(base, adapters, tmp_path / "out", full=True).ok
    differs = name != "DoRA, then plain"
    checked = lorafast.verify(base, adapters, tmp_path / "out", strategy="weighted")
    assert checked.ok is not differs


SEQUENCES = SEVERAL | {
    "rows, a product, rows": (
        lora("lin0", trainable_token_indices={"emb": [1, 2, 5]}),
        lora("lin0", "emb", r=3),
        lora("lin1", trainable_token_indices={"emb": [2, 7]}),
    ),
    "rows, then DoRA elsewhere": (
        lora("lin1", trainable_token_indices={"emb": [1, 2, 5]}),
        lora("lin0", "lin1", use_dora=True),
    ),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_in_sequence_is_one_after_the_other(toys: Toys, tmp_path: Path, name: str) -> None:
    """In float32 each rounding between is as small as those of the sums."""
    base = toys.base("layers")
    adapters = [
        toys.adapter(f"compat-{name}-{number}".replace(" ", "_"), base, dict(settings), seed=number)
        for number, settings in enumerate(SEQUENCES[name])
    ]
    lorafast.merge(base, adapters, tmp_path / "at once")
    before = base
    for number, adapter in enumerate(adapters):
        lorafast.merge(before, adapter, tmp_path / f"step {number}")
        before = tmp_path / f"step {number}"
    ours = read_checkpoint(tmp_path / "at once")
    for key, expected in read_checkpoint(before).items():
        error = np.abs(ours[key].float64() - expected.float64()).max()
        assert error <= 1e-6 * max(1.0, np.abs(expected.float64()).max()), key
