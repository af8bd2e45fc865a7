"""An adapter of a language model merged into a model with it as one of several towers, and back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import Tensor, read_checkpoint, read_safetensors, tensor
from support.handmade import adapter_tensors, make_adapter, make_base
from support.reference import PREFIX
from support.refusal import refuses

#: Modules of a language model of two layers, below whatever its names begin with.
TEXT = {
    f"layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "self_attn.q_proj": (24, 20),
        "self_attn.o_proj": (20, 24),
        "mlp.up_proj": (50, 20),
    }.items()
}
TEXT_CONFIG = {
    "model_type": "toy_text",
    "vocab_size": 30,
    "hidden_size": 20,
    "num_hidden_layers": 2,
}
#: Where a model of images has its language model and its other tower, by models in transformers.
NESTS = {
    "Qwen3-VL": ("model.language_model.", "model.visual.", "lm_head"),
    "Gemma 4": ("model.language_model.", "model.vision_tower.encoder.", "lm_head"),
    "Mistral3 and LLaVA on disk": (
        "language_model.model.",
        "vision_tower.transformer.",
        "language_model.lm_head",
    ),
    "Idefics3": ("model.text_model.", "model.vision_model.encoder.", "lm_head"),
}


def under(prefix: str, modules: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"{prefix}{name}": shape for name, shape in modules.items()}


def embeddings(prefix: str, head: str, rows: int = 30) -> dict[str, Tensor]:
    random = np.random.default_rng(6)
    return {
        f"{prefix}embed_tokens.weight": tensor(random.normal(size=(rows, 20))),
        f"{head}.weight": tensor(random.normal(size=(rows, 20))),
    }


def wrapper(
    path: Path,
    nest: str = "Qwen3-VL",
    *,
    vision: Mapping[str, tuple[int, int]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    text, other, head = NESTS[nest]
    vision = {"layers.0.self_attn.q_proj": (16, 12)} if vision is None else vision
    modules = under(other, vision) | under(text, TEXT)
    config = {"model_type": "toy_vl", "text_config": TEXT_CONFIG} if config is None else config
    return make_base(path, modules=modules, config=config, others=embeddings(text, head))


def text_only(path: Path, prefix: str = "model.", **config: Any) -> Path:
    return make_base(
        path,
        modules=under(prefix, TEXT),
        config=TEXT_CONFIG | config,
        others=embeddings(prefix, "lm_head"),
    )


def assert_merged(base: Path, adapter: Path, output: Path, names: Mapping[str, str]) -> list[str]:
    """Every module changed its tensor by 2·B·A in float64, and nothing else changed."""
    report = lorafast.merge(base, adapter, output)
    before, after = read_checkpoint(base), read_checkpoint(output)
    factors = read_safetensors(adapter / "adapter_model.safetensors")
    for module, name in names.items():
        a, b = (factors[f"{PREFIX}{module}.lora_{side}.weight"].float64() for side in "AB")
        right = before[name].float64() + 2 * b @ a
        assert np.allclose(after[name].float64(), right, rtol=1e-6, atol=1e-7), name
    changed = {name for name in before if before[name] != after[name]}
    assert changed == set(names.values())
    assert lorafast.verify(base, adapter, output).ok
    return list(report.notes)


@pytest.mark.parametrize("own", ["model.", "", "language_model.model.", "model.text_model."])
@pytest.mark.parametrize("nest", NESTS)
def test_a_language_model_s_adapter_fits_its_tower(tmp_path: Path, nest: str, own: str) -> None:
    base = wrapper(tmp_path / "base", nest)
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(under(own, TEXT)))
    text = NESTS[nest][0]
    names = {f"{own}{name}": f"{text}{name}.weight" for name in TEXT}
    notes = assert_merged(base, adapter, tmp_path / "out", names)
    assert len(notes) == (0 if own == text else 1)
    # An analysis finds the same weights.
    analysis = lorafast.analyze(adapter, base=base)
    found = {path: module.base_tensor for path, module in analysis.modules.items()}
    assert found == names


def test_the_note_says_by_what(tmp_path: Path) -> None:
    base = wrapper(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(under("model.", TEXT)))
    (note,) = lorafast.plan(base, adapter).notes
    assert '"model."' in note
    assert '"model.language_model."' in note
    assert "text_config" in note


@pytest.mark.parametrize("nest", ["Qwen3-VL", "Idefics3"])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_tower_s_adapter_fits_the_language_model(tmp_path: Path, nest: str, prefix: str) -> None:
    base = text_only(tmp_path / "base", prefix)
    own = NESTS[nest][0]
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(under(own, TEXT)))
    names = {f"{own}{name}": f"{prefix}{name}.weight" for name in TEXT}
    assert len(assert_merged(base, adapter, tmp_path / "out", names)) == 1


def test_heads_embeddings_and_what_was_saved_come_along(tmp_path: Path) -> None:
    """What lies beside the tower keeps its name, what lies in it changes with it."""
    base = wrapper(tmp_path / "base")
    saved = {
        f"{PREFIX}model.embed_tokens.weight": tensor(np.ones((30, 20))),
        f"{PREFIX}model.layers.0.mlp.up_proj.base_layer.weight": tensor(np.ones((50, 20))),
    }
    modules = under("model.", TEXT) | {"lm_head": (30, 20)}
    adapter = make_adapter(
        tmp_path / "adapter", adapter_tensors(modules) | saved, modules_to_save=["embed_tokens"]
    )
    lorafast.merge(base, adapter, tmp_path / "out")
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    assert set(after) == set(before)
    assert (after["model.language_model.embed_tokens.weight"].float64() == 1).all()
    assert after["lm_head.weight"] != before["lm_head.weight"]


def test_a_tied_tower_s_embeddings(tmp_path: Path) -> None:
    text = "model.language_model."
    config = {"text_config": TEXT_CONFIG, "tie_word_embeddings": True}
    others = {
        f"{text}embed_tokens.weight": embeddings(text, "lm_head")[f"{text}embed_tokens.weight"]
    }
    base = make_base(tmp_path / "base", modules=under(text, TEXT), config=config, others=others)
    random = np.random.default_rng(2)
    factors = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": tensor(random.normal(size=(4, 30))),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": tensor(random.normal(size=(20, 4))),
    }
    modules = adapter_tensors(under("model.", TEXT))
    adapter = make_adapter(tmp_path / "adapter", modules | factors)
    lorafast.merge(base, adapter, tmp_path / "out")
    a, b = (value.float64() for value in factors.values())
    name = f"{text}embed_tokens.weight"
    right = others[name].float64() + 2 * (b @ a).T
    assert np.allclose(read_checkpoint(tmp_path / "out")[name].float64(), right, atol=1e-5)


def test_experts_of_a_tower(tmp_path: Path) -> None:
    """Factors of a parameter (`target_parameters`) find it in the tower as well."""
    random = np.random.default_rng(7)
    text, experts = "model.language_model.", "layers.0.mlp.experts"
    weight = tensor(random.normal(size=(3, 50, 20)))
    others = embeddings(text, "lm_head") | {f"{text}{experts}.gate_up_proj": weight}
    config = {"text_config": TEXT_CONFIG}
    base = make_base(tmp_path / "base", modules=under(text, TEXT), config=config, others=others)
    factors = {
        f"{PREFIX}model.{experts}.lora_A.weight": tensor(random.normal(size=(12, 20))),
        f"{PREFIX}model.{experts}.lora_B.weight": tensor(random.normal(size=(50, 12))),
    }
    adapter = make_adapter(
        tmp_path / "adapter",
        factors,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj"],
        peft_version="0.21.2",
    )
    lorafast.merge(base, adapter, tmp_path / "out")
    a, b = (value.float64() for value in factors.values())
    found = read_checkpoint(tmp_path / "out")[f"{text}{experts}.gate_up_proj"].float64()
    for expert in range(3):
        delta = 2 * b.reshape(50, 4, 3)[:, :, expert] @ a[4 * expert : 4 * expert + 4]
        assert np.allclose(found[expert], weight.float64()[expert] + delta, atol=1e-5)


def test_modules_of_the_other_tower_are_named(tmp_path: Path) -> None:
    base = text_only(tmp_path / "base")
    modules = under("model.language_model.", TEXT) | {"model.visual.blocks.0.attn.qkv": (36, 12)}
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(modules))
    raised = refuses(tmp_path, lorafast.PlanError, base, adapter, "model.visual.blocks.0.attn.qkv")
    assert "model.language_model.layers" not in str(raised)


def test_a_vision_tower_that_fits_as_well_is_an_error(tmp_path: Path) -> None:
    vision = {"layers.0.self_attn.q_proj": (24, 20), "layers.1.self_attn.q_proj": (24, 20)}
    queries = {name: shape for name, shape in TEXT.items() if name.endswith("q_proj")}
    for count, own in enumerate(["model.", ""]):
        base = wrapper(tmp_path / f"base{count}", "Gemma 4", vision=vision)
        adapter = make_adapter(tmp_path / f"adapter{count}", adapter_tensors(under(own, queries)))
        refuses(
            tmp_path,
            lorafast.PlanError,
            base,
            adapter,
            "model.language_model.",
            "model.vision_tower.encoder.",
            "nothing tells which",
        )
        for path in ("refused", "previous"):
            shutil.rmtree(tmp_path / path, ignore_errors=True)
    # One module that the vision tower does not have, or another shape, and it is the text tower's.
    base = tmp_path / "base0"
    adapter = make_adapter(tmp_path / "more", adapter_tensors(under("model.", TEXT)))
    lorafast.plan(base, adapter)
    other = wrapper(tmp_path / "other", "Gemma 4", vision=dict.fromkeys(vision, (24, 12)))
    lorafast.plan(other, tmp_path / "adapter0")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "toy_vl"},
        {"model_type": "toy_vl", "text_config": TEXT_CONFIG | {"hidden_size": 24}},
        {"model_type": "toy_vl", "text_config": TEXT_CONFIG | {"num_hidden_layers": 5}},
        {"model_type": "toy_vl", "text_config": TEXT_CONFIG | {"vocab_size": 31}},
    ],
    ids=["no text config", "another width", "more layers", "more tokens"],
)
def test_without_the_config_s_word_it_stays_an_error(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    base = wrapper(tmp_path / "base", config=config)
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(under("model.", TEXT)))
    refuses(tmp_path, lorafast.PlanError, base, adapter, "model.layers.0", "fits no tensor")


def test_a_vision_adapter_is_none_of_the_language_model(tmp_path: Path) -> None:
    base = text_only(tmp_path / "base")
    modules = under("model.vision_tower.", TEXT)
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(modules))
    refuses(tmp_path, lorafast.PlanError, base, adapter, "model.vision_tower.layers.0")
    towers = wrapper(tmp_path / "towers")
    with pytest.raises(lorafast.PlanError, match="fits no tensor"):
        lorafast.plan(towers, adapter)


def test_a_tower_of_other_shapes_is_an_error(tmp_path: Path) -> None:
    base = wrapper(tmp_path / "base")
    modules = under("model.", dict.fromkeys(TEXT, (28, 22)))
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(modules))
    refuses(tmp_path, lorafast.PlanError, base, adapter, "of shape [28, 22]")


def test_a_toy_of_transformers_is_merged_as_peft_merges_the_language_model(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3VLConfig
    from transformers import Qwen3VLForConditionalGeneration as Whole

    text: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [],
    }
    whole = Whole(Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False))
    whole.save_pretrained(tmp_path / "whole")
    language = Qwen3ForCausalLM(Qwen3Config(**text))
    inner = {k: v.clone() for k, v in whole.model.language_model.state_dict().items()}
    language.model.load_state_dict(inner)
    language.lm_head.load_state_dict(whole.lm_head.state_dict())
    language.save_pretrained(tmp_path / "language")
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(language, config)
    model.save_pretrained(str(tmp_path / "adapter"))
    lorafast.merge(tmp_path / "whole", tmp_path / "adapter", tmp_path / "merged")
    found = Whole.from_pretrained(tmp_path / "merged").model
    right = model.merge_and_unload().model.state_dict()
    for name, value in found.language_model.state_dict().items():
        torch.testing.assert_close(value, right[name])
    for name, value in found.visual.state_dict().items():
        assert torch.equal(value, whole.model.visual.state_dict()[name])
    # And back: an adapter of the whole model, in the language model alone.
    queries = LoraConfig(
        r=4, lora_alpha=16, target_modules=r".*language_model.*q_proj", init_lora_weights=False
    )
    model = get_peft_model(whole, queries)
    model.save_pretrained(str(tmp_path / "tower"))
    lorafast.merge(tmp_path / "language", tmp_path / "tower", tmp_path / "back")
    right = model.merge_and_unload().model.language_model.state_dict()
    back = Qwen3ForCausalLM.from_pretrained(tmp_path / "back").model.state_dict()
    for name, value in back.items():
        torch.testing.assert_close(value, right[name])
    changed = [name for name, value in back.items() if not torch.equal(value, inner[name])]
    assert len(changed) == 2
