"""Element-by-element strategies on weights that are stored fused, transposed or quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from numpy.typing import NDArray
from support import dense_methods
from support.files import read_checkpoint, tensor
from support.handmade import adapter_tensors, make_adapter, make_base
from support.quantised import SCHEMES, Scheme
from support.reference import PREFIX

Array = NDArray[np.float64]

EXPERTS, RANK, HIDDEN, WIDTH = 3, 4, 20, 12
AT = "model.layers.0.mlp.experts"
TIES: dict[str, Any] = {"strategy": "ties", "strategy_options": {"density": 0.5}}


def ties(updates: list[Array]) -> Array:
    """TIES at a density of a half, all weights one."""
    kept = []
    for values in updates:
        order = np.argsort(-np.abs(values.astype(np.float32).ravel()), kind="stable")
        mask = np.zeros(values.size, bool)
        mask[order[: values.size // 2]] = True
        kept.append(np.where(mask.reshape(values.shape), values, 0))
    stack = np.array(kept)
    sign = np.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = stack * sign > 0
    return np.asarray(np.where(agree, stack, 0).sum(0) / np.maximum(agree.sum(0), 1))


def factors(module: str, seed: int, shape: tuple[int, int]) -> tuple[Array, Array]:
    tensors = adapter_tensors({module: shape}, rank=RANK, seed=seed)
    a = tensors[f"{PREFIX}{module}.lora_A.weight"].float64()
    b = tensors[f"{PREFIX}{module}.lora_B.weight"].float64()
    return a, b


@pytest.mark.parametrize("fused", [False, True])
def test_experts_are_merged_one_by_one(tmp_path: Path, fused: bool) -> None:
    random = np.random.default_rng(3)
    shapes = {
        "gate_proj": (WIDTH, HIDDEN),
        "up_proj": (WIDTH, HIDDEN),
        "down_proj": (HIDDEN, WIDTH),
    }
    weights = {name: random.normal(size=(EXPERTS, *shape)) for name, shape in shapes.items()}
    if fused:
        gate_up = np.concatenate([weights["gate_proj"], weights["up_proj"]], axis=1)
        others = {
            f"{AT}.gate_up_proj": tensor(gate_up, "F32"),
            f"{AT}.down_proj": tensor(weights["down_proj"], "F32"),
        }
    else:
        others = {
            f"{AT}.{index}.{name}.weight": tensor(weight[index], "F32")
            for name, weight in weights.items()
            for index in range(EXPERTS)
        }
    base = make_base(
        tmp_path / "base", modules={}, others=others, config={"model_type": "qwen3_moe"}
    )
    adapters, deltas = [], []
    for number in range(2):
        tensors, own = {}, {}
        for name, (rows, columns) in shapes.items():
            a = random.normal(size=(EXPERTS, RANK, columns))
            b = random.normal(size=(EXPERTS, rows, RANK))
            own[name] = 2 * np.matmul(b, a)
            tensors[f"{PREFIX}{AT}.{name}.lora_A.weight"] = tensor(a, "F32")
            tensors[f"{PREFIX}{AT}.{name}.lora_B.weight"] = tensor(b, "F32")
        adapters.append(make_adapter(tmp_path / f"adapter-{number}", tensors))
        deltas.append(own)
    lorafast.merge(base, adapters, tmp_path / "out", **TIES)
    after = read_checkpoint(tmp_path / "out")
    for name, weight in weights.items():
        for index in range(EXPERTS):
            change = ties([own[name][index] for own in deltas])
            if not fused:
                found = after[f"{AT}.{index}.{name}.weight"].float64()
            elif name == "down_proj":
                found = after[f"{AT}.down_proj"].float64()[index]
            else:
                both = after[f"{AT}.gate_up_proj"].float64()[index]
                found = both[:WIDTH] if name == "gate_proj" else both[WIDTH:]
            off = np.abs(found - weight[index].astype(np.float32) - change) > 1e-4
            assert off.mean() < 0.01, (name, index)
    assert lorafast.verify(base, adapters, tmp_path / "out", full=True, **TIES).ok


def test_masks_of_experts_differ(tmp_path: Path) -> None:
    others = {f"{AT}.down_proj": tensor(np.zeros((EXPERTS, HIDDEN, WIDTH)), "F32")}
    base = make_base(
        tmp_path / "base", modules={}, others=others, config={"model_type": "qwen3_moe"}
    )
    tensors = {
        f"{PREFIX}{AT}.down_proj.lora_A.weight": tensor(np.ones((EXPERTS, RANK, WIDTH)), "F32"),
        f"{PREFIX}{AT}.down_proj.lora_B.weight": tensor(np.ones((EXPERTS, HIDDEN, RANK)), "F32"),
    }
    adapter = make_adapter(tmp_path / "adapter", tensors)
    lorafast.merge(
        base,
        adapter,
        tmp_path / "out",
        strategy="dare_linear",
        strategy_options={"density": 0.5},
    )
    kept = read_checkpoint(tmp_path / "out")[f"{AT}.down_proj"].float64() != 0
    for index in range(EXPERTS):
        assert 0.3 < kept[index].mean() < 0.7
        assert 0.3 < (kept[index] == kept[index - 1]).mean() < 0.7


def transposed(tmp_path: Path) -> tuple[Path, list[Path], list[Array]]:
    """A weight that is stored as (in, out), and two adapters of it."""
    module, shape = "transformer.h.0.attn.c_attn", (24, 20)
    weight = np.random.default_rng(4).normal(scale=0.05, size=shape[::-1])
    base = make_base(
        tmp_path / "base",
        modules={},
        others={f"{module}.weight": tensor(weight, "F32")},
        config={"model_type": "gpt2"},
    )
    settings: dict[str, Any] = {"fan_in_fan_out": True, "target_modules": ["c_attn"]}
    adapters, updates = [], []
    for seed in (1, 2):
        tensors = adapter_tensors({module: shape}, rank=RANK, seed=seed)
        adapters.append(make_adapter(tmp_path / f"adapter-{seed}", tensors, **settings))
        a, b = factors(module, seed, shape)
        updates.append(2 * (b @ a))
    return base, adapters, updates


def test_weights_that_are_stored_transposed(tmp_path: Path) -> None:
    base, adapters, updates = transposed(tmp_path)
    lorafast.merge(base, adapters, tmp_path / "out", **TIES)
    name = "transformer.h.0.attn.c_attn.weight"
    found = read_checkpoint(tmp_path / "out")[name].float64()
    before = read_checkpoint(base)[name].float64()
    np.testing.assert_allclose(found - before, ties(updates).T, atol=1e-6)
    assert lorafast.verify(base, adapters, tmp_path / "out", full=True, **TIES).ok


DELLA: dict[str, Any] = {
    "strategy": "della_linear",
    "strategy_options": {"density": 0.5, "epsilon": 0.3},
    "seed": 5,
}


def della_linear(updates: list[Array], module: str) -> Array:
    """What `DELLA` makes, ranked in the rows of the updates."""
    kept = [
        dense_methods.della(update, 0.5, 0.3, dense_methods.uniform(5, module, place, update.shape))
        for place, update in enumerate(updates)
    ]
    return np.asarray(sum(kept))


def test_della_ranks_in_the_rows_of_the_update_however_the_weight_is_stored(tmp_path: Path) -> None:
    base, adapters, updates = transposed(tmp_path)
    lorafast.merge(base, adapters, tmp_path / "out", threads=1, **DELLA)
    lorafast.merge(base, adapters, tmp_path / "same", threads=3, **DELLA)
    module = "transformer.h.0.attn.c_attn"
    after = read_checkpoint(tmp_path / "out")[f"{module}.weight"]
    assert after.data == read_checkpoint(tmp_path / "same")[f"{module}.weight"].data
    before = read_checkpoint(base)[f"{module}.weight"].float64()
    expected = della_linear(updates, module)
    np.testing.assert_allclose(after.float64() - before, expected.T, atol=1e-6)
    assert lorafast.verify(base, adapters, tmp_path / "out", full=True, **DELLA).ok
    # The same adapters on a weight that is stored as (out, in).
    straight = make_base(
        tmp_path / "straight",
        modules={},
        others={f"{module}.weight": tensor(before.T, "F32")},
        config={"model_type": "llama"},
    )
    plain = []
    for seed in (1, 2):
        tensors = adapter_tensors({module: (24, 20)}, rank=RANK, seed=seed)
        plain.append(make_adapter(tmp_path / f"plain-{seed}", tensors))
    lorafast.merge(straight, plain, tmp_path / "turned", **DELLA)
    turned = read_checkpoint(tmp_path / "turned")[f"{module}.weight"].float64()
    np.testing.assert_array_equal(turned.T, after.float64())


@pytest.mark.parametrize("strategy", [DELLA, TIES], ids=["della_linear", "ties"])
def test_embeddings_are_merged_as_they_are_combined(
    tmp_path: Path, strategy: dict[str, Any]
) -> None:
    tokens, width, name = 30, 12, "model.embed_tokens"
    random = np.random.default_rng(9)
    base = make_base(
        tmp_path / "base",
        modules={},
        others={f"{name}.weight": tensor(random.normal(size=(tokens, width)), "F32")},
    )
    adapters, updates = [], []
    for number in range(2):
        a, b = random.normal(size=(RANK, tokens)), random.normal(size=(width, RANK))
        tensors = {
            f"{PREFIX}{name}.lora_embedding_A": tensor(a, "F32"),
            f"{PREFIX}{name}.lora_embedding_B": tensor(b, "F32"),
        }
        settings: dict[str, Any] = {"target_modules": ["embed_tokens"], "lora_alpha": RANK}
        path = make_adapter(tmp_path / str(number), tensors, r=RANK, **settings)
        adapters.append(path)
        updates.append(b.astype(np.float32).astype(float) @ a.astype(np.float32))
    lorafast.merge(base, adapters, tmp_path / "out", **strategy)
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    change = after[f"{name}.weight"].float64() - before[f"{name}.weight"].float64()
    expected = ties(updates) if strategy is TIES else della_linear(updates, name)
    np.testing.assert_allclose(change, expected.T, atol=1e-5)
    assert lorafast.verify(base, adapters, tmp_path / "out", full=True, **strategy).ok
    lorafast.combine(
        adapters,
        tmp_path / "both",
        method=strategy["strategy"],
        options=strategy["strategy_options"],
        rank=width,
        seed=strategy.get("seed", 0),
    )
    lorafast.merge(base, tmp_path / "both", tmp_path / "one")
    one = read_checkpoint(tmp_path / "one")[f"{name}.weight"].float64()
    np.testing.assert_allclose(one, after[f"{name}.weight"].float64(), atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_quantised_weights_are_merged_and_quantised_again(tmp_path: Path, scheme: Scheme) -> None:
    shapes = {"model.layers.0.q_proj": (300, 260), "model.layers.0.up_proj": (600, 1100)}
    random = np.random.default_rng(11)
    others = {}
    for module, shape in shapes.items():
        others |= scheme.quantise(f"{module}.weight", random.normal(scale=0.05, size=shape))
    config = {"quantization_config": dict(scheme.config)}
    base = make_base(tmp_path / "base", modules={}, dtype="BF16", others=others, config=config)
    adapters = [
        make_adapter(tmp_path / f"adapter-{seed}", adapter_tensors(shapes, seed=seed, scale=0.15))
        for seed in (1, 2)
    ]
    lorafast.merge(base, adapters, tmp_path / "one", threads=1, **TIES)
    lorafast.merge(base, adapters, tmp_path / "two", threads=3, **TIES)
    one, two = read_checkpoint(tmp_path / "one"), read_checkpoint(tmp_path / "two")
    assert {name: value.data for name, value in one.items()} == {
        name: value.data for name, value in two.items()
    }
    assert lorafast.verify(base, adapters, tmp_path / "one", **TIES).ok
    lorafast.merge(base, adapters, tmp_path / "wide", dtype="float32", **TIES)
    assert lorafast.verify(base, adapters, tmp_path / "wide", **TIES).ok


def test_another_device_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    modules = {"model.layers.0.q_proj": (24, 20)}
    base = make_base(tmp_path / "base", modules=modules)
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(modules))
    with pytest.raises(ValueError, match="CPU alone"):
        lorafast.merge(base, adapter, tmp_path / "out", device="torch:cpu", **TIES)
    assert not (tmp_path / "out").exists()
    # Sums are any device's.
    slerp: dict[str, Any] = {"strategy": "karcher"}
    lorafast.merge(base, adapter, tmp_path / "sum", device="torch:cpu", **slerp)
    assert lorafast.verify(base, adapter, tmp_path / "sum", **slerp).ok
