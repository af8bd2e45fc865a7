"""Factors of all experts in one tensor each, in every layout that trainers save them in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import Tensor, read_checkpoint, tensor, write_safetensors
from support.handmade import adapter_tensors, make_adapter, make_base
from support.reference import PREFIX

Array = np.ndarray[Any, np.dtype[np.float64]]

EXPERTS, RANK, HIDDEN, WIDTH = 3, 4, 20, 12
AT = "model.layers.0.mlp.experts"
A, B = ".lora_A.weight", ".lora_B.weight"
#: One matrix of an expert: (out, in).
MATRICES = {
    "gate_proj": (WIDTH, HIDDEN),
    "up_proj": (WIDTH, HIDDEN),
    "down_proj": (HIDDEN, WIDTH),
}
FUSED = {"gate_up_proj": (2 * WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}

random = np.random.default_rng(11)


def natural(shape: tuple[int, int], layout: str) -> tuple[Array, Array]:
    """A [experts, rank, in] and B [experts, out, rank]."""
    outputs, inputs = shape
    a = random.normal(size=(1 if layout == "A shared" else EXPERTS, RANK, inputs))
    b = random.normal(size=(1 if layout == "B shared" else EXPERTS, outputs, RANK))
    return a, b


def stored(a: Array, b: Array, layout: str) -> tuple[Array, Array]:
    """The same as a layout stores them."""
    match layout:
        case "transposed":
            return a.transpose(0, 2, 1), b.transpose(0, 2, 1)
        case "flat A":
            return a.reshape(-1, a.shape[2]), b
        case "flat B":
            # The expert is the fastest index of the columns, as PEFT has it.
            return a, b.transpose(1, 2, 0).reshape(b.shape[1], -1)
        case _:
            return a, b


def product(a: Array, b: Array) -> Array:
    """B·A of each expert, of which one factor may be that of all."""
    return np.matmul(b, a)


LAYOUTS = ["stacked", "A shared", "B shared", "transposed", "flat A", "flat B"]


def make(
    path: Path, matrices: Mapping[str, tuple[int, int]], layout: str, scale: float = 2.0
) -> tuple[Path, dict[str, Array]]:
    """An adapter with factors of these matrices, and what it adds to each."""
    tensors, deltas = {}, {}
    for name, shape in matrices.items():
        a, b = natural(shape, layout)
        deltas[name] = scale * product(a, b)
        first, second = stored(a, b, layout)
        tensors[f"{PREFIX}{AT}.{name}{A}"] = tensor(first, "F64")
        tensors[f"{PREFIX}{AT}.{name}{B}"] = tensor(second, "F64")
    return make_adapter(path, tensors, r=RANK, lora_alpha=scale * RANK), deltas


def make_experts(path: Path, kind: str, model: str = "qwen3_moe") -> Path:
    own = np.random.default_rng(12)
    weights = {name: own.normal(size=(EXPERTS, *shape)) for name, shape in MATRICES.items()}
    if kind == "fused":
        gate_up = np.concatenate([weights["gate_proj"], weights["up_proj"]], axis=1)
        others = {
            f"{AT}.gate_up_proj": tensor(gate_up, "F64"),
            f"{AT}.down_proj": tensor(weights["down_proj"], "F64"),
        }
    else:
        others = {
            f"{AT}.{index}.{name}.weight": tensor(weight[index], "F64")
            for name, weight in weights.items()
            for index in range(EXPERTS)
        }
    return make_base(path, modules={}, others=others, dtype="F64", config={"model_type": model})


def expected(deltas: Mapping[str, Array], kind: str) -> dict[str, Array]:
    """What is added to each tensor of the base."""
    if "gate_up_proj" in deltas:
        gate, up = np.split(deltas["gate_up_proj"], 2, axis=1)
        single = {"gate_proj": gate, "up_proj": up, "down_proj": deltas["down_proj"]}
    else:
        single = dict(deltas)
    if kind == "fused":
        gate_up = np.concatenate([single["gate_proj"], single["up_proj"]], axis=1)
        return {f"{AT}.gate_up_proj": gate_up, f"{AT}.down_proj": single["down_proj"]}
    return {
        f"{AT}.{index}.{name}.weight": value[index]
        for name, value in single.items()
        for index in range(EXPERTS)
    }


def assert_added(base: Path, output: Path, deltas: Mapping[str, Array]) -> None:
    before, after = read_checkpoint(base), read_checkpoint(output)
    for name, value in after.items():
        if name in deltas:
            right = before[name].float64() + deltas[name]
            assert np.allclose(value.float64(), right, rtol=1e-12, atol=1e-12), name
            assert not np.allclose(value.float64(), before[name].float64()), name
        else:
            assert value == before[name], name


@pytest.mark.parametrize("kind", ["one by one", "fused"])
@pytest.mark.parametrize("names", ["apart", "fused"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_merged_into_every_kind_of_base(
    layout: str, names: str, kind: str, tmp_path: Path
) -> None:
    adapter, deltas = make(tmp_path / "x", MATRICES if names == "apart" else FUSED, layout)
    base = make_experts(tmp_path / "base", kind)
    lorafast.merge(base, adapter, tmp_path / "out")
    assert_added(base, tmp_path / "out", expected(deltas, kind))
    assert lorafast.verify(base, adapter, tmp_path / "out").ok
    plan = lorafast.plan(base, adapter).to_dict()
    uses = {each["use"] for each in plan["adapters"][0]["coverage"]["tensors"]}
    assert uses == {"used"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_are_measured_and_compared_expert_by_expert(layout: str, tmp_path: Path) -> None:
    adapter, deltas = make(tmp_path / "own", FUSED, layout)
    analysis = lorafast.analyze(adapter)
    for name, value in deltas.items():
        for index in range(EXPERTS):
            found = [
                module
                for path, module in analysis.modules.items()
                if path.endswith(f"{AT}.{name}[{index}]")
            ]
            assert len(found) == 1
            assert found[0].frobenius_norm == pytest.approx(float(np.linalg.norm(value[index])))
    # The same products expert by expert, gate and up apart.
    gate, up = np.split(deltas["gate_up_proj"], 2, axis=1)
    apart = {"gate_proj": gate, "up_proj": up, "down_proj": deltas["down_proj"]}
    tensors = {}
    for name, value in apart.items():
        for index in range(EXPERTS):
            u, s, v = np.linalg.svd(value[index] / 2)
            key = f"{PREFIX}{AT}.{index}.{name}"
            tensors[f"{key}{A}"] = tensor(v[:RANK], "F64")
            tensors[f"{key}{B}"] = tensor(u[:, :RANK] * s[:RANK], "F64")
    other = make_adapter(tmp_path / "other", tensors, r=RANK, lora_alpha=2 * RANK)
    fleet = lorafast.scan(adapter)
    assert not fleet.errors
    assert lorafast.similarity([adapter, other]).matrix[0][1] == pytest.approx(1, abs=1e-6)


def test_mixtral_s_names_are_other_programs_w1_w2_and_w3(tmp_path: Path) -> None:
    renamed = dict(zip(("w1", "w3", "w2"), MATRICES.values(), strict=True))
    adapter, deltas = make(tmp_path / "x", renamed, "stacked")
    own = dict(zip(MATRICES, deltas.values(), strict=True))
    for kind in ("one by one", "fused"):
        base = make_experts(tmp_path / kind, kind)
        lorafast.merge(base, adapter, tmp_path / f"out {kind}")
        assert_added(base, tmp_path / f"out {kind}", expected(own, kind))


def test_a_base_whose_rules_nobody_knows_is_found_by_its_names(tmp_path: Path) -> None:
    adapter, deltas = make(tmp_path / "x", MATRICES, "stacked")
    for kind in ("one by one", "fused"):
        base = make_experts(tmp_path / kind, kind, model="nobody_s")
        lorafast.merge(base, adapter, tmp_path / f"out {kind}")
        assert_added(base, tmp_path / f"out {kind}", expected(deltas, kind))


def test_a_rank_of_one_is_told_from_a_convolution(tmp_path: Path) -> None:
    """Four experts of rank 1 with four outputs have a convolution's shapes; the rank tells."""
    tensors = {
        f"{PREFIX}{AT}.down_proj{A}": tensor(np.ones((4, 1, 20))),
        f"{PREFIX}{AT}.down_proj{B}": tensor(np.ones((4, 4, 1))),
    }
    adapter = make_adapter(tmp_path / "experts", tensors, r=1)
    assert len(lorafast.analyze(adapter).modules) == 4


def test_several_adapters_add_up_and_are_taken_out_again(tmp_path: Path) -> None:
    base = make_experts(tmp_path / "base", "fused")
    first, of_first = make(tmp_path / "x", FUSED, "stacked")
    second, of_second = make(tmp_path / "y", MATRICES, "A shared")
    lorafast.merge(base, [first, second], tmp_path / "out", weights=[0.5, 0.25])
    one, other = expected(of_first, "fused"), expected(of_second, "fused")
    both = {name: 0.5 * one[name] + 0.25 * other[name] for name in one}
    assert_added(base, tmp_path / "out", both)


BROKEN: dict[str, tuple[tuple[int, ...], tuple[int, ...], str]] = {
    "counts": ((5, 4, 20), (8, 50, 4), "kernel|pair"),
    "ranks": ((8, 5, 20), (8, 50, 5), "rank 5, but the config gives this module rank 4"),
    "no experts": ((0, 4, 20), (0, 50, 4), "nothing|rank 0"),
    "four dimensions": ((8, 4, 20, 1), (8, 50, 4), "no pair of factors"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_shapes_that_are_made_up_are_said_in_one_sentence(name: str, tmp_path: Path) -> None:
    a, b, sentence = BROKEN[name]
    key = f"{PREFIX}{AT}.gate_up_proj"
    tensors = {f"{key}{A}": tensor(np.ones(a)), f"{key}{B}": tensor(np.ones(b))}
    adapter = make_adapter(tmp_path / "adapter", tensors, r=4)
    with pytest.raises(lorafast.AdapterError, match=sentence):
        lorafast.inspect(adapter)


def test_a_magnitude_or_a_bias_beside_them_belongs_to_nothing(tmp_path: Path) -> None:
    key = f"{PREFIX}{AT}.gate_up_proj"
    tensors = {
        f"{key}{A}": tensor(np.ones((8, 4, 20))),
        f"{key}{B}": tensor(np.ones((8, 50, 4))),
        f"{key}.lora_magnitude_vector": tensor(np.ones(50)),
    }
    adapter = make_adapter(tmp_path / "adapter", tensors, use_dora=True)
    with pytest.raises(lorafast.AdapterError, match="to which none belongs"):
        lorafast.inspect(adapter)


def test_kohya_s_experts_are_called_so(tmp_path: Path) -> None:
    key = "lora_unet_model_layers_0_mlp_experts_gate_up_proj"
    path = write_safetensors(
        tmp_path / "experts.safetensors",
        {
            f"{key}.lora_down.weight": tensor(np.ones((8, 4, 20))),
            f"{key}.lora_up.weight": tensor(np.ones((8, 50, 4))),
        },
    )
    with pytest.raises(lorafast.UnsupportedAdapterError, match="factors of 8 experts"):
        lorafast.inspect(path)


def test_a_half_alone_is_named(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = dict(adapter_tensors())
    tensors[f"{PREFIX}{AT}.gate_up_proj{A}"] = tensor(np.ones((8, 4, 20)))
    adapter = make_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(lorafast.AdapterError, match="but not its lora_B"):
        lorafast.inspect(adapter)
