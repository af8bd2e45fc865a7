"""Element-by-element strategies of updates that are more than a product of two stored factors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support import dense_methods
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


def dora(folder: Path) -> Path:
    tensors = adapter_tensors(rank=4, seed=1)
    random = np.random.default_rng(2)
    for module, (rows, _) in MODULES.items():
        magnitudes = random.uniform(0.1, 0.4, size=rows)
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = tensor(magnitudes, "F32")
    return make_adapter(folder / "dora", tensors, use_dora=True, r=4, lora_alpha=8)


def saved(folder: Path) -> Path:
    """A module that was trained whole, beside products."""
    first, *others = MODULES
    tensors = adapter_tensors({module: MODULES[module] for module in others}, rank=4, seed=3)
    whole = np.random.default_rng(4).normal(scale=0.05, size=MODULES[first])
    tensors[f"{PREFIX}{first}.weight"] = tensor(whole, "F32")
    settings: dict[str, Any] = {"modules_to_save": [first], "target_modules": others}
    return make_adapter(folder / "saved", tensors, r=4, lora_alpha=8, **settings)


def ia3(folder: Path) -> Path:
    random = np.random.default_rng(6)
    tensors = {
        f"{PREFIX}{module}.ia3_l": tensor(random.uniform(0.5, 1.5, size=(rows, 1)), "F32")
        for module, (rows, _) in MODULES.items()
    }
    settings: dict[str, Any] = {"peft_type": "IA3", "feedforward_modules": []}
    return make_adapter(folder / "ia3", tensors, **settings)


@pytest.mark.parametrize("kind", [dora, saved, ia3], ids=["dora", "saved", "ia3"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("method", ["ties", "dare_linear", "della_linear"])
def test_what_more_than_adds_is_merged_as_what_it_changes(
    tmp_path: Path, kind: Callable[[Path], Path], dtype: str, method: Any
) -> None:
    base = make_base(tmp_path / "base", dtype=dtype)
    adapters = [kind(tmp_path), make_adapter(tmp_path / "other", adapter_tensors(seed=2))]
    options = {"density": 0.5} | ({"epsilon": 0.3} if method == "della_linear" else {})
    asked: dict[str, Any] = {
        "strategy": method,
        "strategy_options": options,
        "weights": [1.0, -0.5],
        "seed": 2,
    }
    lorafast.merge(base, adapters, tmp_path / "out", threads=1, **asked)
    lorafast.merge(base, adapters, tmp_path / "same", threads=3, **asked)
    before = read_checkpoint(base)
    after, same = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "same")
    wide = []
    for place, adapter in enumerate(adapters):
        lorafast.merge(base, adapter, tmp_path / f"alone-{place}", dtype="float32")
        wide.append(read_checkpoint(tmp_path / f"alone-{place}"))
    for module in MODULES:
        name = f"{module}.weight"
        assert after[name].data == same[name].data
        first = before[name].float64()
        deltas = [each[name].float64() - first for each in wide]
        numbers = [
            dense_methods.uniform(2, module, place, first.shape) for place in range(len(deltas))
        ]
        pairs = list(zip(deltas, numbers, strict=True))
        match method:
            case "ties":
                expected = dense_methods.ties(deltas, [1.0, -0.5], 0.5)
            case "dare_linear":
                kept = [dense_methods.dare(delta, 0.5, own) for delta, own in pairs]
                expected = kept[0] - kept[1] / 2
            case _:
                kept = [dense_methods.della(delta, 0.5, 0.3, own) for delta, own in pairs]
                expected = kept[0] - kept[1] / 2
        change = after[name].float64() - first
        atol = 1e-5 if dtype == "F32" else 4e-3
        assert np.abs(expected).max() > 2 * atol
        assert (np.abs(change - expected) > atol).mean() < 0.02, module
    assert lorafast.verify(base, adapters, tmp_path / "out", full=True, **asked).ok
    wrong = {**asked, "weights": [1.0, 0.5]}
    assert not lorafast.verify(base, adapters, tmp_path / "out", **wrong).ok


def test_a_module_that_was_trained_whole_is_trimmed_even_alone(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base", dtype="F32"), saved(tmp_path)
    asked: dict[str, Any] = {
        "strategy": "magnitude_prune",
        "strategy_options": {"density": 0.25},
    }
    lorafast.merge(base, adapter, tmp_path / "out", **asked)
    name = f"{next(iter(MODULES))}.weight"
    before, after = read_checkpoint(base)[name], read_checkpoint(tmp_path / "out")[name]
    assert (before.float64() != after.float64()).mean() == pytest.approx(0.25, abs=0.01)
    assert lorafast.verify(base, adapter, tmp_path / "out", full=True, **asked).ok


def test_dora_of_a_weight_that_is_stored_transposed(tmp_path: Path) -> None:
    module, (outputs, inputs) = "transformer.h.0.attn.c_attn", (24, 20)
    weight = np.random.default_rng(1).normal(scale=0.05, size=(inputs, outputs))
    others = {f"{module}.weight": tensor(weight, "F32")}
    config = {"model_type": "gpt2"}
    base = make_base(tmp_path / "base", modules={}, others=others, config=config)
    settings: dict[str, Any] = {"fan_in_fan_out": True, "target_modules": ["c_attn"]}
    tensors = adapter_tensors({module: (outputs, inputs)}, rank=4, seed=1)
    other = make_adapter(tmp_path / "other", tensors, **settings)
    tensors = adapter_tensors({module: (outputs, inputs)}, rank=4, seed=2)
    name = f"{PREFIX}{module}.lora_magnitude_vector"
    tensors[name] = tensor(np.random.default_rng(3).uniform(0.1, 0.4, size=outputs), "F32")
    rescaled = make_adapter(tmp_path / "dora", tensors, use_dora=True, **settings)
    asked: dict[str, Any] = {
        "strategy": "della_linear",
        "strategy_options": {"density": 0.5, "epsilon": 0.3},
    }
    lorafast.merge(base, [rescaled, other], tmp_path / "out", **asked)
    first = read_checkpoint(base)[f"{module}.weight"].float64()
    expected = np.zeros((outputs, inputs))
    for place, adapter in enumerate([rescaled, other]):
        lorafast.merge(base, adapter, tmp_path / str(place))
        alone = read_checkpoint(tmp_path / str(place))[f"{module}.weight"].float64()
        numbers = dense_methods.uniform(0, module, place, (outputs, inputs))
        expected += dense_methods.della((alone - first).T, 0.5, 0.3, numbers)
    change = read_checkpoint(tmp_path / "out")[f"{module}.weight"].float64() - first
    assert (np.abs(change - expected.T) > 1e-5).mean() < 0.02
    merged = tmp_path / "out"
    assert lorafast.verify(base, [rescaled, other], merged, full=True, **asked).ok
