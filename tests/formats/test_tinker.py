"""tinker's names and expert factors, against float64 references."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import Tensor, read_checkpoint, tensor
from support.handmade import make_adapter, make_base
from support.reference import PREFIX

Array = np.ndarray[Any, np.dtype[np.float64]]

EXPERTS, RANK, HIDDEN, WIDTH = 3, 4, 20, 12
LAYER = "model.layers.0"
#: One matrix of an expert: tinker's name, (out, in), which factor is shared.
MATRICES = {
    "w1": ((WIDTH, HIDDEN), "A"),
    "w3": ((WIDTH, HIDDEN), "A"),
    "w2": ((HIDDEN, WIDTH), "B"),
}


def pair(key: str, a: Array, b: Array) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{key}.lora_A.weight": tensor(a, "F64"),
        f"{PREFIX}{key}.lora_B.weight": tensor(b, "F64"),
    }


def linear(key: str, outputs: int, inputs: int) -> tuple[dict[str, Tensor], Array]:
    random = np.random.default_rng(len(key))
    a, b = random.normal(size=(RANK, inputs)), random.normal(size=(outputs, RANK))
    return pair(key, a, b), 2 * b @ a


def experts() -> tuple[dict[str, Tensor], dict[str, Array]]:
    random = np.random.default_rng(4)
    tensors, deltas = {}, {}
    for name, ((outputs, inputs), shared) in MATRICES.items():
        a = random.normal(size=(1 if shared == "A" else EXPERTS, RANK, inputs))
        b = random.normal(size=(1 if shared == "B" else EXPERTS, outputs, RANK))
        tensors |= pair(f"{LAYER}.mlp.experts.{name}", a, b)
        deltas[name] = 2 * np.matmul(b, a)
    return tensors, deltas


def make(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    return make_adapter(path, tensors, r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")


def check(base: Path, adapter: Path, output: Path, deltas: Mapping[str, Array]) -> None:
    lorafast.merge(base, adapter, output)
    before, after = read_checkpoint(base), read_checkpoint(output)
    for name, value in after.items():
        if name in deltas:
            right = before[name].float64() + deltas[name]
            assert np.allclose(value.float64(), right, rtol=1e-12, atol=1e-12), name
        else:
            assert value == before[name], name
    assert set(deltas) <= set(after)
    assert lorafast.verify(base, adapter, output).ok


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    random = np.random.default_rng(7)
    return {name: tensor(random.normal(size=shape), "F64") for name, shape in shapes.items()}


def test_the_head_is_unembed_tokens(tmp_path: Path) -> None:
    tensors, delta = linear("model.unembed_tokens", 40, HIDDEN)
    adapter = make(tmp_path / "tinker", tensors)
    base = make_base(
        tmp_path / "base",
        dtype="F64",
        others=weights({"lm_head.weight": (40, HIDDEN), "model.embed_tokens.weight": (40, HIDDEN)}),
    )
    check(base, adapter, tmp_path / "out", {"lm_head.weight": delta})
    plan = lorafast.plan(base, adapter).to_dict()
    assert plan["adapters"][0]["format"] == "tinker"
    assert lorafast.inspect(adapter).to_dict()["adapter"]["r"] == RANK


def test_a_tied_head_is_the_embedding_s(tmp_path: Path) -> None:
    tensors, delta = linear("model.unembed_tokens", 40, HIDDEN)
    adapter = make(tmp_path / "tinker", tensors)
    others = weights({"model.embed_tokens.weight": (40, HIDDEN)})
    base = make_base(
        tmp_path / "base", dtype="F64", others=others, config={"tie_word_embeddings": True}
    )
    lorafast.merge(base, adapter, tmp_path / "out")
    after = read_checkpoint(tmp_path / "out")
    embedding = others["model.embed_tokens.weight"].float64()
    head = after.get("lm_head.weight", after["model.embed_tokens.weight"])
    assert np.allclose(head.float64(), embedding + delta)


@pytest.mark.parametrize("kind", ["one by one", "fused"])
def test_experts_share_one_factor(kind: str, tmp_path: Path) -> None:
    tensors, deltas = experts()
    adapter = make(tmp_path / "tinker", tensors)
    at = f"{LAYER}.mlp.experts"
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    if kind == "fused":
        shapes = {f"{at}.gate_up_proj": (EXPERTS, 2 * WIDTH, HIDDEN),
                  f"{at}.down_proj": (EXPERTS, HIDDEN, WIDTH)}  # fmt: skip
        right = {
            f"{at}.gate_up_proj": np.concatenate([deltas["w1"], deltas["w3"]], axis=1),
            f"{at}.down_proj": deltas["w2"],
        }
    else:
        shapes = {
            f"{at}.{index}.{names[name]}.weight": shape
            for name, (shape, _) in MATRICES.items()
            for index in range(EXPERTS)
        }
        right = {
            f"{at}.{index}.{names[name]}.weight": delta[index]
            for name, delta in deltas.items()
            for index in range(EXPERTS)
        }
    base = make_base(
        tmp_path / "base", modules={}, dtype="F64", others=weights(shapes),
        config={"model_type": "qwen3_moe"},
    )  # fmt: skip
    check(base, adapter, tmp_path / "out", right)
    analysis = lorafast.analyze(adapter, base=base)
    found = sum(module.frobenius_norm**2 for module in analysis.modules.values())
    assert found == pytest.approx(sum(float(np.sum(delta**2)) for delta in deltas.values()))


def test_gpt_oss_has_another_attention_and_rows_in_turn(tmp_path: Path) -> None:
    tensors, deltas = experts()
    attention, delta = linear(f"{LAYER}.attn.q_proj", 24, HIDDEN)
    adapter = make(tmp_path / "tinker", tensors | attention)
    at = f"{LAYER}.mlp.experts"
    shapes = {
        f"{at}.gate_up_proj": (EXPERTS, HIDDEN, 2 * WIDTH),
        f"{at}.down_proj": (EXPERTS, WIDTH, HIDDEN),
        f"{LAYER}.self_attn.q_proj.weight": (24, HIDDEN),
    }
    turns = np.empty((EXPERTS, 2 * WIDTH, HIDDEN))
    turns[:, 0::2], turns[:, 1::2] = deltas["w1"], deltas["w3"]
    right = {
        f"{at}.gate_up_proj": turns.transpose(0, 2, 1),
        f"{at}.down_proj": deltas["w2"].transpose(0, 2, 1),
        f"{LAYER}.self_attn.q_proj.weight": delta,
    }
    base = make_base(
        tmp_path / "base", modules={}, dtype="F64", others=weights(shapes),
        config={"model_type": "gpt_oss"},
    )  # fmt: skip
    check(base, adapter, tmp_path / "out", right)
    assert not lorafast.scan(adapter).errors
    only_gate = {key: value for key, value in tensors.items() if ".w1." in key}
    half = np.zeros_like(turns)
    half[:, 0::2] = deltas["w1"]
    check(
        base,
        make(tmp_path / "gate", only_gate),
        tmp_path / "half",
        {f"{at}.gate_up_proj": half.transpose(0, 2, 1)},
    )


def test_square_experts_of_gpt_oss_lie_as_the_model_takes_them(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    a, b = random.normal(size=(1, RANK, 20)), random.normal(size=(EXPERTS, 20, RANK))
    tensors = pair(f"{LAYER}.mlp.experts.w2", a, b)
    name = f"{LAYER}.mlp.experts.down_proj"
    others = weights({name: (EXPERTS, 20, 20)})
    base = make_base(
        tmp_path / "base", modules={}, dtype="F64", others=others, config={"model_type": "gpt_oss"}
    )
    right = {name: 2 * np.matmul(b, a).transpose(0, 2, 1)}
    check(base, make(tmp_path / "tinker", tensors), tmp_path / "out", right)


@pytest.mark.parametrize("model", ["qwen3_5_text", "qwen3_5", "qwen3_5_moe"])
def test_qwen3_5_s_linear_attention_is_joined(model: str, tmp_path: Path) -> None:
    at = f"{LAYER}.linear_attn"
    parts = {"q": 6, "k": 6, "v": 10}
    tensors, deltas = {}, {}
    for part, outputs in parts.items():
        own, deltas[part] = linear(f"{at}.in_proj_{part}", outputs, HIDDEN)
        tensors |= own
    others = weights({f"{at}.in_proj_qkv.weight": (22, HIDDEN)})
    base = make_base(
        tmp_path / "base", modules={}, dtype="F64", others=others, config={"model_type": model}
    )
    right = {f"{at}.in_proj_qkv.weight": np.concatenate([deltas[part] for part in parts])}
    adapter = make(tmp_path / "tinker", tensors)
    check(base, adapter, tmp_path / "out", right)
    assert lorafast.plan(base, adapter).to_dict()["adapters"][0]["format"] == "tinker"
    partial = {key: value for key, value in tensors.items() if ".in_proj_v." not in key}
    with pytest.raises(lorafast.PlanError, match="nothing tells the sizes of the others"):
        lorafast.plan(base, make(tmp_path / "partial", partial))


def test_gate_and_up_of_two_shapes_do_not_lie_in_turn(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    tensors = {}
    for name, outputs in (("w1", 12), ("w3", 10)):
        a = random.normal(size=(1, RANK, HIDDEN))
        b = random.normal(size=(EXPERTS, outputs, RANK))
        tensors |= pair(f"{LAYER}.mlp.experts.{name}", a, b)
    tensors |= linear(f"{LAYER}.attn.q_proj", 24, HIDDEN)[0]
    with pytest.raises(lorafast.UnsupportedAdapterError, match="not the same shape and scale"):
        lorafast.analyze(make(tmp_path / "tinker", tensors))


def test_matrices_that_a_model_does_not_have_are_empty(tmp_path: Path) -> None:
    tensors, deltas = experts()
    kept = {name: value for name, value in tensors.items() if ".w2." in name}
    kept |= pair(f"{LAYER}.mlp.experts.w3", np.ones((0, RANK, HIDDEN)), np.ones((0, WIDTH, RANK)))
    at = f"{LAYER}.mlp.experts.down_proj"
    base = make_base(
        tmp_path / "base", modules={}, dtype="F64", others=weights({at: (EXPERTS, HIDDEN, WIDTH)})
    )
    adapter = make(tmp_path / "tinker", kept)
    check(base, adapter, tmp_path / "out", {at: deltas["w2"]})
    uses = lorafast.inspect(adapter).to_dict()["adapter"]["coverage"]["tensors"]
    assert sorted(each["use"] for each in uses) == ["not_needed"] * 2 + ["used"] * 2


def test_what_it_holds_beyond_the_base_is_named(tmp_path: Path) -> None:
    tensors, _ = experts()
    base = make_base(tmp_path / "base", dtype="F64")
    with pytest.raises(lorafast.PlanError, match=r"experts\.w1|experts"):
        lorafast.plan(base, make(tmp_path / "tinker", tensors))
