"""Extraction of models whose parameters have other names or shapes in memory than on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file
from support.files import Tensor, read_checkpoint, tensor
from support.handmade import write_checkpoint

Array = npt.NDArray[Any]

EXPERTS, HIDDEN, WIDTH = 3, 20, 12
LAYER = "model.layers.0"


def write_model(path: Path, tensors: dict[str, Tensor], model: str) -> Path:
    path.mkdir()
    write_checkpoint(path, tensors)
    (path / "config.json").write_text(json.dumps({"model_type": model}))
    return path


def update(random: np.random.Generator, rows: int, columns: int, rank: int) -> Array:
    return np.asarray(random.normal(size=(rows, rank)) @ random.normal(size=(rank, columns)))


def states(model: str, random: np.random.Generator) -> tuple[dict[str, Array], dict[str, Array]]:
    """A base, and what was added to it: expert e has a rank of 1 + e in each matrix."""

    def of_experts(rows: int, columns: int) -> tuple[Array, Array]:
        weight = random.normal(size=(EXPERTS, rows, columns))
        added = [update(random, rows, columns, 1 + index) for index in range(EXPERTS)]
        return weight, np.stack(added)

    weights, deltas = {}, {}
    q = f"{LAYER}.self_attn.q_proj.weight"
    weights[q], deltas[q] = random.normal(size=(16, HIDDEN)), update(random, 16, HIDDEN, 2)
    if model == "mixtral":
        at = f"{LAYER}.block_sparse_moe"
        gate = f"{at}.gate.weight"
        weights[gate] = random.normal(size=(EXPERTS, HIDDEN))
        deltas[gate] = update(random, EXPERTS, HIDDEN, 1)
        for name, shape in {
            "w1": (WIDTH, HIDDEN),
            "w3": (WIDTH, HIDDEN),
            "w2": (HIDDEN, WIDTH),
        }.items():
            weight, added = of_experts(*shape)
            for index in range(EXPERTS):
                own = f"{at}.experts.{index}.{name}.weight"
                weights[own], deltas[own] = weight[index], added[index]
        return weights, deltas
    for name, shape in {"gate_up_proj": (2 * WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}.items():
        own = f"{LAYER}.mlp.experts.{name}"
        weights[own], deltas[own] = of_experts(*(shape[::-1] if model == "gpt_oss" else shape))
    return weights, deltas


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_have_factors_under_the_names_in_memory(tmp_path: Path, model: str) -> None:
    weights, deltas = states(model, np.random.default_rng(3))
    base = write_model(
        tmp_path / "base", {name: tensor(value, "F32") for name, value in weights.items()}, model
    )
    tuned = write_model(
        tmp_path / "tuned",
        {name: tensor(value + deltas[name], "F32") for name, value in weights.items()},
        model,
    )
    report = lorafast.extract(tuned, base, tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    at = f"{LAYER}.mlp.experts"
    assert config["target_parameters"] == [f"{at}.gate_up_proj", f"{at}.down_proj"]
    modules = [f"{LAYER}.self_attn.q_proj"]
    modules += [f"{LAYER}.mlp.gate"] if model == "mixtral" else []
    assert sorted(config["target_modules"]) == sorted(modules)
    assert report.saved == ()
    down = report.modules[f"{at}.down_proj"]
    assert down.expert_ranks == (1, 2, 3)
    assert (down.shape, down.rank) == ((HIDDEN, WIDTH), 3)
    assert report.error < 1e-5
    # PEFT's layout: A (experts · rank, in), B (out, rank · experts).
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    prefix = f"base_model.model.{at}"
    assert tensors[f"{prefix}.lora_A.weight"].shape == (3 * EXPERTS, WIDTH)
    rank = 6 if model == "mixtral" else 3
    assert tensors[f"{prefix}.base_layer.lora_A.weight"].shape == (rank * EXPERTS, HIDDEN)
    lorafast.merge(base, tmp_path / "out", tmp_path / "again")
    again = read_checkpoint(tmp_path / "again")
    for name, value in read_checkpoint(tuned).items():
        np.testing.assert_allclose(again[name].float64(), value.float64(), atol=2e-5, err_msg=name)


def test_a_budget_gives_all_experts_of_a_parameter_one_rank(tmp_path: Path) -> None:
    weights, deltas = states("qwen3_moe", np.random.default_rng(4))
    base, tuned = (
        write_model(
            tmp_path / where,
            {name: tensor(value + c * deltas[name], "F32") for name, value in weights.items()},
            "qwen3_moe",
        )
        for where, c in (("base", 0), ("tuned", 1))
    )
    report = lorafast.extract(tuned, base, tmp_path / "out", rank="budget:ranks=4")
    worth = []
    for name, delta in deltas.items():
        values = np.linalg.svd(delta, compute_uv=False)
        squares = (values**2).sum(axis=0) if values.ndim == 2 else values**2
        worth += [(value, name.removesuffix(".weight")) for value in squares]
    best = [name for _, name in sorted(worth, reverse=True)[:4]]
    assert report.ranks == {
        name.removesuffix(".weight"): best.count(name.removesuffix(".weight")) for name in deltas
    }
    sizes = {f"{LAYER}.self_attn.q_proj": 16 + HIDDEN}
    sizes[f"{LAYER}.mlp.experts.gate_up_proj"] = EXPERTS * (2 * WIDTH + HIDDEN)
    sizes[f"{LAYER}.mlp.experts.down_proj"] = EXPERTS * (WIDTH + HIDDEN)
    assert report.bytes == sum(4 * sizes[name] * rank for name, rank in report.ranks.items())


def test_a_format_without_experts_has_them_as_they_are_stored(tmp_path: Path) -> None:
    weights, deltas = states("mixtral", np.random.default_rng(5))
    base, tuned = (
        write_model(
            tmp_path / where,
            {name: tensor(value + c * deltas[name], "F32") for name, value in weights.items()},
            "mixtral",
        )
        for where, c in (("base", 0), ("tuned", 1))
    )
    lorafast.extract(tuned, base, tmp_path / "out.safetensors", to="kohya")
    names = load_file(tmp_path / "out.safetensors")
    assert any("experts_1_w2.lora_down" in name for name in names)
    lorafast.merge(base, tmp_path / "out.safetensors", tmp_path / "again")
    again = read_checkpoint(tmp_path / "again")
    for name, value in read_checkpoint(tuned).items():
        np.testing.assert_allclose(again[name].float64(), value.float64(), atol=2e-5, err_msg=name)


def test_an_expert_in_which_nothing_differs_has_rank_zero(tmp_path: Path) -> None:
    weights, deltas = states("qwen3_moe", np.random.default_rng(6))
    down, gate_up = f"{LAYER}.mlp.experts.down_proj", f"{LAYER}.mlp.experts.gate_up_proj"
    deltas[down][0] = 0
    deltas[gate_up][:] = 0
    base, tuned = (
        write_model(
            tmp_path / where,
            {name: tensor(value + c * deltas[name], "F32") for name, value in weights.items()},
            "qwen3_moe",
        )
        for where, c in (("base", 0), ("tuned", 1))
    )
    report = lorafast.extract(tuned, base, tmp_path / "out")
    assert gate_up not in report.modules
    assert report.modules[down].expert_ranks == (0, 2, 3)
    lorafast.merge(base, tmp_path / "out", tmp_path / "again")
    again = read_checkpoint(tmp_path / "again")
    for name, value in read_checkpoint(tuned).items():
        np.testing.assert_allclose(again[name].float64(), value.float64(), atol=2e-5, err_msg=name)
