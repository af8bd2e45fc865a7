"""Element-by-element strategies of updates that are more than a product of two stored factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import read_checkpoint, tensor
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base
from support.reference import PREFIX

TIES: dict[str, Any] = {"strategy": "ties", "strategy_options": {"density": 0.5}}
DARE: dict[str, Any] = {
    "strategy": "dare_linear",
    "strategy_options": {"density": 0.5, "lambda": 0.5},
    "weights": [2.0, -1.0],
    "seed": 3,
}


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("asked", [TIES, DARE], ids=["ties", "dare_linear"])
def test_factors_that_began_with_a_part_of_the_base(
    tmp_path: Path, start: str, asked: dict[str, Any]
) -> None:
    base = make_base(tmp_path / "base", dtype="F32")
    settings: dict[str, Any] = {"init_lora_weights": start, "r": 4, "lora_alpha": 6}
    began = make_adapter(tmp_path / start, adapter_tensors(rank=4, seed=1), **settings)
    other = make_adapter(tmp_path / "other", adapter_tensors(rank=4, seed=2))
    lorafast.merge(base, [began, other], tmp_path / "out", **asked)
    assert lorafast.verify(base, [began, other], tmp_path / "out", full=True, **asked).ok
    lorafast.bake(began, tmp_path / "plain", plain=True, base=base)
    lorafast.merge(base, [tmp_path / "plain", other], tmp_path / "same", **asked)
    one, two = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "same")
    before = read_checkpoint(base)
    for module in MODULES:
        values, others, first = (read[f"{module}.weight"].float64() for read in (one, two, before))
        assert np.abs(values - first).max() > 1e-3
        # Elements whose magnitudes are nearly that of the threshold may be kept in one alone.
        assert (np.abs(values - others) > 1e-5).mean() < 0.02
    with pytest.raises(lorafast.UnsupportedAdapterError, match=r"lorafast\.bake"):
        lorafast.plan(base, [began, other], strategy="slerp")


def test_biases_of_second_factors_are_summed(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    others = {
        f"{module}.bias": tensor(random.normal(size=rows), "F32")
        for module, (rows, _) in MODULES.items()
    }
    base = make_base(tmp_path / "base", dtype="F32", others=others)
    adapters, biases = [], []
    for seed in (1, 2):
        tensors, own = adapter_tensors(rank=4, seed=seed), {}
        for module, (rows, _) in MODULES.items():
            own[module] = random.normal(size=rows).astype(np.float32).astype(float)
            tensors[f"{PREFIX}{module}.lora_B.bias"] = tensor(own[module], "F32")
        settings: dict[str, Any] = {"lora_bias": True, "r": 4, "lora_alpha": 8}
        adapters.append(make_adapter(tmp_path / str(seed), tensors, **settings))
        biases.append(own)
    lorafast.merge(base, adapters, tmp_path / "out", **DARE)
    assert lorafast.verify(base, adapters, tmp_path / "out", full=True, **DARE).ok
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    for module in MODULES:
        change = after[f"{module}.bias"].float64() - before[f"{module}.bias"].float64()
        expected = 0.5 * 2 * (2 * biases[0][module] - biases[1][module])
        np.testing.assert_allclose(change, expected, atol=1e-5)
    # As a combination has them.
    options = DARE["strategy_options"]
    lorafast.combine(
        adapters,
        tmp_path / "both",
        method="dare_linear",
        options=options,
        weights=DARE["weights"],
        seed=3,
        rank=20,
    )
    lorafast.merge(base, tmp_path / "both", tmp_path / "one")
    one = read_checkpoint(tmp_path / "one")
    for name, value in after.items():
        np.testing.assert_allclose(one[name].float64(), value.float64(), atol=1e-5)
