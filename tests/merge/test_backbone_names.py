"""A backbone that the class for answers calls otherwise than the other classes of its family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import Tensor, read_checkpoint, read_safetensors, tensor
from support.handmade import adapter_tensors, make_adapter, make_base
from support.quantised import SCHEMES, Scheme
from support.reference import PREFIX
from support.refusal import refuses

SHAPES = {
    f"layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {"self_attn.q_proj": (24, 20), "mlp.up_proj": (50, 20)}.items()
}
CONFIG = {"vocab_size": 30, "hidden_size": 20, "num_hidden_layers": 2}


def under(prefix: str) -> dict[str, tuple[int, int]]:
    return {f"{prefix}{name}": shape for name, shape in SHAPES.items()}


def embeddings(prefix: str) -> dict[str, Tensor]:
    random = np.random.default_rng(6)
    return {
        f"{prefix}embed_tokens.weight": tensor(random.normal(size=(30, 20))),
        "lm_head.weight": tensor(random.normal(size=(30, 20))),
    }


def make_model(
    path: Path, kind: str = "llama", prefix: str = "model.", shards: int = 2, **config: Any
) -> Path:
    settings = CONFIG | {"model_type": kind, "architectures": ["LlamaForCausalLM"]} | config
    return make_base(
        path, modules=under(prefix), config=settings, shards=shards, others=embeddings(prefix)
    )


def make_answers(path: Path, prefix: str = "transformer.", *, seed: int = 1) -> Path:
    head = {
        f"{PREFIX}qa_outputs.weight": tensor(np.ones((2, 20))),
        f"{PREFIX}qa_outputs.bias": tensor(np.ones(2)),
    }
    tensors = adapter_tensors(under(prefix), seed=seed) | head
    return make_adapter(
        path, tensors, task_type="QUESTION_ANS", modules_to_save=["classifier", "qa_outputs"]
    )


def product(adapter: Path, module: str) -> Any:
    factors = read_safetensors(adapter / "adapter_model.safetensors")
    a, b = (factors[f"{PREFIX}{module}.lora_{side}.weight"].float64() for side in "AB")
    return 2 * b @ a


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "smollm3", "nemotron"])
def test_the_output_has_the_names_of_its_class(tmp_path: Path, kind: str, shards: int) -> None:
    base = make_model(tmp_path / "base", kind, shards=shards)
    adapter = make_answers(tmp_path / "adapter")
    plan = lorafast.plan(base, adapter)
    assert any(
        '"transformer."' in note and "LlamaForQuestionAnswering" in note for note in plan.notes
    )
    assert not plan.warnings
    report = lorafast.merge(base, adapter, tmp_path / "out", verify=True)
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    renamed = {name.replace("model.", "transformer.", 1): name for name in before}
    assert set(after) == set(renamed) | {"qa_outputs.weight", "qa_outputs.bias"}
    changed = {f"transformer.{name}.weight" for name in SHAPES}
    for name, old in renamed.items():
        if name in changed:
            right = before[old].float64() + product(adapter, name.removesuffix(".weight"))
            assert np.allclose(after[name].float64(), right, rtol=1e-6, atol=1e-7), name
        else:
            assert after[name] == before[old], name
    # What has another name and the same bytes is neither replaced nor repeated.
    assert report.tensors_merged == len(changed)
    assert report.tensors_copied == len(before) - len(changed)
    assert (report.tensors_repeated, report.tensors_replaced) == (0, 2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForQuestionAnswering"]
    lorafast.subtract(tmp_path / "out", adapter, tmp_path / "back", original=base)
    assert read_checkpoint(tmp_path / "back") == before


def test_verify_finds_names_that_the_class_does_not_load(tmp_path: Path) -> None:
    base, adapter = make_model(tmp_path / "base", shards=1), make_answers(tmp_path / "adapter")
    lorafast.merge(base, adapter, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b'"transformer.', b'"model.').ljust(length)
    path.write_bytes(content[:8] + header + content[8 + length :])
    outcome = lorafast.verify(base, adapter, tmp_path / "out")
    assert len(outcome.problems) == 1
    assert outcome.problems[0].startswith("tensor model.")
    assert 'LlamaForQuestionAnswering calls the backbone "transformer."' in outcome.problems[0]


def test_names_are_the_base_s_where_no_head_is_brought(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(under("transformer.")))
    report = lorafast.merge(base, adapter, tmp_path / "out", verify=True)
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    assert after.keys() == before.keys()
    for name in SHAPES:
        right = before[f"model.{name}.weight"].float64() + product(adapter, f"transformer.{name}")
        assert np.allclose(after[f"model.{name}.weight"].float64(), right, rtol=1e-6, atol=1e-7)
    (note,) = report.notes
    assert "the class for question answering" in note
    found = lorafast.analyze(adapter, base=base).modules
    assert found["transformer.layers.0.mlp.up_proj"].base_tensor == (
        "model.layers.0.mlp.up_proj.weight"
    )


@pytest.mark.parametrize("own", ["model.", "transformer."])
def test_other_adapters_come_along(tmp_path: Path, own: str) -> None:
    """Into a model for answers, and beside the adapter that makes one."""
    plain = make_adapter(tmp_path / "plain", adapter_tensors(under(own), seed=5))
    answers = make_answers(tmp_path / "answers")
    model = make_model(
        tmp_path / "model", prefix="transformer.", architectures=["LlamaForQuestionAnswering"]
    )
    lorafast.merge(model, plain, tmp_path / "into", verify=True)
    lorafast.merge(make_model(tmp_path / "base"), [plain, answers], tmp_path / "two", verify=True)
    before = read_checkpoint(model)
    into, two = read_checkpoint(tmp_path / "into"), read_checkpoint(tmp_path / "two")
    assert into.keys() == before.keys()
    for name in SHAPES:
        key = f"transformer.{name}"
        right = before[f"{key}.weight"].float64() + product(plain, f"{own}{name}")
        assert np.allclose(into[f"{key}.weight"].float64(), right, rtol=1e-6, atol=1e-7)
        right = right + product(answers, key)
        assert np.allclose(two[f"{key}.weight"].float64(), right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_into_a_quantised_base(tmp_path: Path, scheme: Scheme, dtype: str) -> None:
    random = np.random.default_rng(3)
    shape = (64, 128)
    stored = {}
    for module in ("q_proj", "k_proj"):
        weight = random.normal(scale=0.05, size=shape)
        stored |= scheme.quantise(f"model.layers.0.self_attn.{module}.weight", weight)
    base = make_base(
        tmp_path / "base",
        modules={},
        config=CONFIG | {"quantization_config": dict(scheme.config), "model_type": "llama"},
        others=stored | embeddings("model."),
    )
    modules = {"transformer.layers.0.self_attn.q_proj": shape}
    head = {f"{PREFIX}qa_outputs.weight": tensor(np.ones((2, 20)))}
    adapter = make_adapter(
        tmp_path / "adapter",
        adapter_tensors(modules) | head,
        task_type="QUESTION_ANS",
        modules_to_save=["qa_outputs"],
    )
    lorafast.merge(base, adapter, tmp_path / "out", dtype=dtype, verify=True)
    # The very bytes of a merge under the base's own names.
    twin = make_adapter(
        tmp_path / "twin", adapter_tensors({"model.layers.0.self_attn.q_proj": shape})
    )
    lorafast.merge(base, twin, tmp_path / "expected", dtype=dtype)
    expected, out = read_checkpoint(tmp_path / "expected"), read_checkpoint(tmp_path / "out")
    assert out.keys() - expected.keys() >= {"qa_outputs.weight"}
    for name, value in expected.items():
        renamed = name.replace("model.", "transformer.", 1) if name.startswith("model.") else name
        assert out[renamed] == value, name


@pytest.mark.parametrize("kind", ["mistral", "toy"])
def test_a_family_without_such_a_class_is_refused(tmp_path: Path, kind: str) -> None:
    base, adapter = make_model(tmp_path / "base", kind), make_answers(tmp_path / "adapter")
    refuses(tmp_path, lorafast.PlanError, base, adapter, "fits no tensor")


def test_the_names_of_all_other_merges_stay(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(under("model.")))
    report = lorafast.merge(base, adapter, tmp_path / "out")
    assert read_checkpoint(tmp_path / "out").keys() == read_checkpoint(base).keys()
    assert not report.notes
