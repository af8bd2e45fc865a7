"""MLX's factors of experts onto bases that store them one by one, fused or as MLX does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import lorafast
import numpy as np
import pytest
from support.files import Tensor, read_checkpoint, tensor
from support.handmade import make_adapter, make_base
from support.mlx_files import (
    EXPERTS,
    HIDDEN,
    MATRICES,
    MLP,
    WIDTH,
    Array,
    assert_merged,
    expert_factors,
    make_mlx,
)
from support.reference import PREFIX


def expert_base(path: Path, kind: str) -> Path:
    random = np.random.default_rng(8)
    weights = {name: random.normal(size=(EXPERTS, *shape)) for name, shape in MATRICES.items()}
    if kind == "one by one":
        others = {
            f"{MLP}.experts.{index}.{name}.weight": tensor(weight[index])
            for name, weight in weights.items()
            for index in range(EXPERTS)
        }
    elif kind == "fused":
        gate_up = np.concatenate([weights["gate_proj"], weights["up_proj"]], axis=1)
        others = {
            f"{MLP}.experts.gate_up_proj": tensor(gate_up),
            f"{MLP}.experts.down_proj": tensor(weights["down_proj"]),
        }
    else:
        others = {
            f"{MLP}.switch_mlp.{name}.weight": tensor(weight) for name, weight in weights.items()
        }
    return make_base(path, modules={}, others=others, config={"model_type": "qwen3_moe"})


def expert_deltas(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Array]:
    """What is added to each tensor of such a base."""
    deltas = {}
    for name, (_, inputs) in MATRICES.items():
        a = tensors[f"{MLP}.switch_mlp.{name}.lora_a"].float64().reshape(EXPERTS, -1, inputs)
        b = tensors[f"{MLP}.switch_mlp.{name}.lora_b"].float64()
        deltas[name] = 1.5 * np.einsum("eor,eri->eoi", b, a)
    if kind == "one by one":
        return {
            f"{MLP}.experts.{index}.{name}.weight": value[index]
            for name, value in deltas.items()
            for index in range(EXPERTS)
        }
    if kind == "fused":
        gate_up = np.concatenate([deltas["gate_proj"], deltas["up_proj"]], axis=1)
        experts = f"{MLP}.experts"
        return {f"{experts}.gate_up_proj": gate_up, f"{experts}.down_proj": deltas["down_proj"]}
    return {f"{MLP}.switch_mlp.{name}.weight": value for name, value in deltas.items()}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", ["one by one", "fused", "mlx"])
def test_factors_of_experts_find_them_however_the_base_stores_them(
    kind: str, flat: bool, tmp_path: Path
) -> None:
    base, tensors = expert_base(tmp_path / "base", kind), expert_factors(flat=flat)
    adapter = make_mlx(tmp_path / "mlx", tensors)
    lorafast.merge(base, adapter, tmp_path / "out")
    before = read_checkpoint(base)
    deltas = expert_deltas(tensors, kind)
    assert_merged(
        base,
        tmp_path / "out",
        {name: before[name].float64() + value for name, value in deltas.items()},
    )
    assert lorafast.verify(base, adapter, tmp_path / "out").ok
    analysis = lorafast.analyze(adapter, base=base)
    assert len(analysis.modules) == 3 * EXPERTS
    norms = sum(module.frobenius_norm**2 for module in analysis.modules.values())
    expected = sum(float(np.sum(value**2)) for value in deltas.values())
    assert norms == pytest.approx(expected, rel=1e-6)


def test_an_adapter_of_more_or_fewer_experts_is_of_another_model(tmp_path: Path) -> None:
    tensors = expert_factors()
    for count, says in ((2, "the base has more"), (4, "the base has no")):
        own = {
            name: tensor(np.resize(value.float64(), (count, *value.shape[1:])))
            for name, value in tensors.items()
        }
        adapter = make_mlx(tmp_path / f"mlx{count}", own)
        base = expert_base(tmp_path / f"base{count}", "one by one")
        with pytest.raises(lorafast.PlanError, match=says):
            lorafast.plan(base, adapter)
        fused = expert_base(tmp_path / f"fused{count}", "fused")
        with pytest.raises(lorafast.PlanError, match=r"has 3 in|\[3, 24, 20\]"):
            lorafast.plan(fused, adapter)


def test_experts_of_mlx_and_of_peft_are_compared_one_by_one(tmp_path: Path) -> None:
    tensors = expert_factors()
    mlx = make_mlx(tmp_path / "mlx", tensors)
    one_by_one = {}
    for name in MATRICES:
        for part, letter in zip("ab", "AB", strict=True):
            stacked = tensors[f"{MLP}.switch_mlp.{name}.lora_{part}"].float64()
            for index in range(EXPERTS):
                key = f"{PREFIX}{MLP}.experts.{index}.{name}.lora_{letter}.weight"
                one_by_one[key] = tensor(stacked[index])
    peft = make_adapter(tmp_path / "peft", one_by_one, lora_alpha=6)
    found = lorafast.similarity([mlx, peft])
    assert found.matrix[0][1] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", ["fused", "mlx"])
def test_gpt_oss_has_gate_and_up_in_turn_and_mlx_apart(kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng(8)
    at = f"{MLP}.experts"
    tensors, deltas = {}, {}
    for name, (outputs, inputs) in MATRICES.items():
        a, b = random.normal(size=(EXPERTS, 4, inputs)), random.normal(size=(EXPERTS, outputs, 4))
        tensors |= {f"{at}.{name}.lora_a": tensor(a), f"{at}.{name}.lora_b": tensor(b)}
        deltas[name] = 1.5 * np.matmul(*(tensors[f"{at}.{name}.lora_{x}"].float64() for x in "ba"))
    if kind == "fused":
        turns = np.empty((EXPERTS, 2 * WIDTH, HIDDEN))
        turns[:, 0::2], turns[:, 1::2] = deltas["gate_proj"], deltas["up_proj"]
        changes = {"gate_up_proj": turns, "down_proj": deltas["down_proj"]}
        changes = {f"{at}.{name}": value.transpose(0, 2, 1) for name, value in changes.items()}
    else:
        changes = {f"{at}.{name}.weight": value for name, value in deltas.items()}
    others = {name: tensor(random.normal(size=value.shape)) for name, value in changes.items()}
    base = make_base(tmp_path / "base", modules={}, others=others, config={"model_type": "gpt_oss"})
    adapter = make_mlx(tmp_path / "mlx", tensors, model="mlx-community/gpt-oss-20b-bf16")
    lorafast.merge(base, adapter, tmp_path / "out")
    before = read_checkpoint(base)
    expected = {name: before[name].float64() + value for name, value in changes.items()}
    assert_merged(base, tmp_path / "out", expected)
    assert lorafast.verify(base, adapter, tmp_path / "out").ok
    assert len(lorafast.analyze(adapter).modules) == 2 * EXPERTS
