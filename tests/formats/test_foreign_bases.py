"""Bases in formats that nothing can be merged into: refused by the format's name, however an
adapter names the weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import Tensor, tensor, write_safetensors
from support.handmade import PREFIX, adapter_tensors, make_adapter, make_base

# Every weight is (8, 32) in the model.
SHAPE = (8, 32)
RANK = 4


def _zeros(dtype: str, *shape: int) -> Tensor:
    return tensor(np.zeros(shape), dtype)


def gptq(module: str) -> dict[str, Tensor]:
    return {
        f"{module}.qweight": _zeros("I32", 4, 8),
        f"{module}.qzeros": _zeros("I32", 1, 1),
        f"{module}.scales": _zeros("F16", 1, 8),
        f"{module}.g_idx": _zeros("I32", 32),
    }


def awq(module: str) -> dict[str, Tensor]:
    return {
        f"{module}.qweight": _zeros("I32", 32, 1),
        f"{module}.qzeros": _zeros("I32", 1, 1),
        f"{module}.scales": _zeros("F16", 1, 8),
    }


def hqq(module: str) -> dict[str, Tensor]:
    return {
        f"{module}.W_q": _zeros("U8", 4, 32),
        f"{module}.scale": _zeros("F16", 8, 1),
        f"{module}.zero": _zeros("F16", 8, 1),
    }


def eetq(module: str) -> dict[str, Tensor]:
    return {
        f"{module}.weight": _zeros("I8", 32, 8),
        f"{module}.weight_scales": _zeros("F16", 8),
    }


def quanto(module: str) -> dict[str, Tensor]:
    return {
        f"{module}.weight._data": _zeros("I8", 8, 32),
        f"{module}.weight._scale": _zeros("F16", 8, 1),
        f"{module}.input_scale": tensor(np.ones(())),
    }


def aqlm(module: str) -> dict[str, Tensor]:
    return {
        f"{module}.codebooks": _zeros("F16", 1, 16, 1, 8),
        f"{module}.codes": _zeros("I8", 8, 4, 1),
        f"{module}.scales": _zeros("F16", 8, 1, 1, 1),
    }


def vptq(module: str) -> dict[str, Tensor]:
    return {
        f"{module}.centroids.weight": _zeros("F16", 1, 64),
        f"{module}.indices": _zeros("I32", 1, 4, 2),
        f"{module}.weight_scale": _zeros("F16", 32),
        f"{module}.weight_bias": _zeros("F16", 32),
    }


def torchao(module: str) -> dict[str, Tensor]:
    return {
        f"{module}._weight_qdata": _zeros("I8", 8, 32),
        f"{module}._weight_scale": _zeros("F32", 8, 1),
    }


Make = Callable[[str], dict[str, Tensor]]
# The tensors of a module, quant_method, the format in words.
FORMATS: dict[str, tuple[Make, str, str]] = {
    "gptq": (gptq, "gptq", "GPTQ"),
    "awq": (awq, "awq", "AWQ"),
    "hqq": (hqq, "hqq", "HQQ"),
    "eetq": (eetq, "eetq", "EETQ"),
    "quanto": (quanto, "quanto", "quanto"),
    "aqlm": (aqlm, "aqlm", "AQLM"),
    "vptq": (vptq, "vptq", "VPTQ"),
    "torchao": (torchao, "torchao", "torchao"),
    "bitnet": (lambda m: {f"{m}.weight": _zeros("U8", 2, 32)}, "bitnet", "BitNet"),
    "metal": (lambda m: {f"{m}.weight": _zeros("U8", 8, 16)}, "metal", "Metal's integers"),
}
# Those that tensors' names alone give away.
UNTOLD = {
    "gptq": (gptq, "GPTQ"),
    "awq": (awq, "GPTQ or AWQ"),
    "hqq": (hqq, "HQQ"),
    "quanto": (quanto, "quanto"),
    "aqlm": (aqlm, "AQLM"),
    "vptq": (vptq, "VPTQ"),
    "torchao": (torchao, "torchao"),
}


def base_of(
    path: Path, make: Make, method: str | None, modules: list[str], model: str = "llama"
) -> Path:
    """Some modules in the format, and one that is not."""
    tensors: dict[str, Tensor] = {"model.layers.0.mlp.plain.weight": tensor(np.ones(SHAPE))}
    for module in modules:
        tensors |= make(module)
    config: dict[str, Any] = {"model_type": model}
    if method is not None:
        config["quantization_config"] = {"quant_method": method}
    return make_base(path, modules={}, others=tensors, config=config)


def module_adapter(path: Path, *modules: str, **settings: Any) -> Path:
    tensors = adapter_tensors(dict.fromkeys(modules, SHAPE))
    names = sorted({module.rsplit(".", 1)[-1] for module in modules})
    return make_adapter(path, tensors, target_modules=names, **settings)


def parameter_adapter(path: Path, module: str, parameter: str, experts: int = 2) -> Path:
    rows, columns = SHAPE
    factors = {
        f"{PREFIX}{module}.lora_A.weight": tensor(np.ones((RANK * experts, columns))),
        f"{PREFIX}{module}.lora_B.weight": tensor(np.ones((rows, RANK * experts))),
    }
    return make_adapter(
        path,
        factors,
        target_modules=[],
        target_parameters=[f"{module.rsplit('.', 1)[-1]}.{parameter}"],
        peft_version="0.21.0",
    )


def kohya_adapter(path: Path, module: str) -> Path:
    key = "lora_unet_" + module.replace(".", "_")
    path.mkdir()
    factors: Mapping[str, Tensor] = {
        f"{key}.lora_down.weight": tensor(np.ones((RANK, SHAPE[1]))),
        f"{key}.lora_up.weight": tensor(np.ones((SHAPE[0], RANK))),
        f"{key}.alpha": tensor(np.float64(4)),
    }
    write_safetensors(path / "kohya.safetensors", factors)
    return path / "kohya.safetensors"


def saved_adapter(path: Path, module: str) -> Path:
    saved = {f"{PREFIX}{module}.weight": tensor(np.ones(SHAPE))}
    return make_adapter(path, saved, modules_to_save=[module.rsplit(".", 1)[-1]])


LAYER = "model.layers.0"
# How the base calls its modules, of which model type it is, and an adapter that names one of them.
NAMINGS: dict[str, tuple[list[str], str, Callable[[Path], Path]]] = {
    "by module": (
        [f"{LAYER}.self_attn.q_proj"],
        "llama",
        lambda path: module_adapter(path, f"{LAYER}.self_attn.q_proj"),
    ),
    "beside one that is not": (
        [f"{LAYER}.self_attn.q_proj"],
        "llama",
        lambda path: module_adapter(path, f"{LAYER}.mlp.plain", f"{LAYER}.self_attn.q_proj"),
    ),
    "with DoRA": (
        [f"{LAYER}.self_attn.q_proj"],
        "llama",
        lambda path: dora_adapter(path, f"{LAYER}.self_attn.q_proj"),
    ),
    "with a prefix more in the base": (
        ["language_model.model.layers.0.self_attn.q_proj"],
        "llama",
        lambda path: module_adapter(path, f"{LAYER}.self_attn.q_proj"),
    ),
    "with a prefix more in the adapter": (
        ["layers.0.self_attn.q_proj"],
        "llama",
        lambda path: module_adapter(path, f"{LAYER}.self_attn.q_proj"),
    ),
    "per expert": (
        [f"{LAYER}.mlp.experts.{expert}.down_proj" for expert in range(2)],
        "qwen3_moe",
        lambda path: module_adapter(path, f"{LAYER}.mlp.experts.1.down_proj"),
    ),
    "by parameter of all experts": (
        [f"{LAYER}.mlp.experts.{expert}.down_proj" for expert in range(2)],
        "qwen3_moe",
        lambda path: parameter_adapter(path, f"{LAYER}.mlp.experts", "down_proj"),
    ),
    "by parameter, of which the base holds halves": (
        [
            f"{LAYER}.mlp.experts.{expert}.{half}_proj"
            for expert in range(2)
            for half in ("gate", "up")
        ],
        "qwen3_moe",
        lambda path: parameter_adapter(path, f"{LAYER}.mlp.experts", "gate_up_proj"),
    ),
    "by a parameter that transformers renames": (
        [f"{LAYER}.block_sparse_moe.experts.{expert}.w2" for expert in range(2)],
        "mixtral",
        lambda path: parameter_adapter(path, f"{LAYER}.mlp.experts", "down_proj"),
    ),
    "by a parameter, with a prefix": (
        [f"language_model.{LAYER}.mlp.experts.{expert}.down_proj" for expert in range(2)],
        "qwen3_moe",
        lambda path: parameter_adapter(path, f"{LAYER}.mlp.experts", "down_proj"),
    ),
    "renamed by transformers": (
        [f"language_model.{LAYER}.self_attn.q_proj"],
        "llava",
        lambda path: module_adapter(path, "model.language_model.layers.0.self_attn.q_proj"),
    ),
    "by one name for all parts": (
        [f"{LAYER}.self_attn.q_proj"],
        "llama",
        lambda path: kohya_adapter(path, f"{LAYER}.self_attn.q_proj"),
    ),
    "saved whole": (
        [f"{LAYER}.self_attn.q_proj"],
        "llama",
        lambda path: saved_adapter(path, f"{LAYER}.self_attn.q_proj"),
    ),
}


def dora_adapter(path: Path, module: str) -> Path:
    tensors = adapter_tensors({module: SHAPE})
    tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = tensor(np.ones(SHAPE[0]))
    return make_adapter(path, tensors, use_dora=True, target_modules=["q_proj"])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("naming", NAMINGS)
def test_refused_by_name(format: str, naming: str, tmp_path: Path) -> None:
    make, method, word = FORMATS[format]
    modules, model, adapter = NAMINGS[naming]
    base = base_of(tmp_path / "base", make, method, modules, model)
    lora = adapter(tmp_path / "adapter")
    for dtype in ("auto", "bfloat16"):
        with pytest.raises(lorafast.LorafastError) as caught:
            lorafast.plan(base, lora, dtype=dtype)
        text = str(caught.value)
        first = f"the base stores quantised with {word} (the first: "
        assert first in text
        assert text.split(first)[1].split(")", maxsplit=1)[0] in modules
        assert "merge into the unquantised base and quantise the result again" in text
        assert "fits no tensor" not in text


@pytest.mark.parametrize("format", UNTOLD)
@pytest.mark.parametrize("naming", ["by module", "by parameter of all experts", "saved whole"])
def test_refused_without_a_config_that_tells(format: str, naming: str, tmp_path: Path) -> None:
    make, word = UNTOLD[format]
    modules, model, adapter = NAMINGS[naming]
    base = base_of(tmp_path / "base", make, None, modules, model)
    with pytest.raises(lorafast.LorafastError, match=f"quantised with {word} "):
        lorafast.plan(base, adapter(tmp_path / "adapter"))


@pytest.mark.parametrize("format", FORMATS)
def test_what_lies_beside_can_be_changed(format: str, tmp_path: Path) -> None:
    make, method, word = FORMATS[format]
    base = base_of(tmp_path / "base", make, method, [f"{LAYER}.self_attn.q_proj"])
    lora = module_adapter(tmp_path / "adapter", f"{LAYER}.mlp.plain")
    merged = tmp_path / "merged"
    report = lorafast.merge(base, lora, merged, verify=True)
    assert report.tensors_merged == 1
    assert (base / "config.json").read_bytes() == (merged / "config.json").read_bytes()
    with pytest.raises(lorafast.LorafastError, match=f"quantised with {word}, which cannot be"):
        lorafast.plan(base, lora, dtype="bfloat16")
    assert word in str(lorafast.inspect(base).to_dict())


def test_a_name_that_only_ends_alike_is_no_refusal(tmp_path: Path) -> None:
    """A vision tower's module is merged, though the language model's of that name is in GPTQ."""
    tensors = gptq("language_model.layers.0.self_attn.q_proj")
    tensors["vision_tower.layers.0.self_attn.q_proj.weight"] = tensor(np.ones(SHAPE))
    config = {"quantization_config": {"quant_method": "gptq"}}
    base = make_base(tmp_path / "base", modules={}, others=tensors, config=config)
    lora = module_adapter(tmp_path / "adapter", "vision_tower.layers.0.self_attn.q_proj")
    report = lorafast.merge(base, lora, tmp_path / "merged", verify=True)
    assert report.tensors_merged == 1


def test_rows_of_tokens_in_such_a_format(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", gptq, "gptq", ["model.embed_tokens"])
    rows = {
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": tensor(np.ones((2, 32)))
    }
    lora = make_adapter(
        tmp_path / "adapter",
        rows | adapter_tensors({f"{LAYER}.mlp.plain": SHAPE}),
        target_modules=["plain"],
        trainable_token_indices=[1, 3],
    )
    with pytest.raises(lorafast.LorafastError, match=r"quantised with GPTQ \(the first: model.emb"):
        lorafast.plan(base, lora)


def test_another_adapter_altogether_is_told_so(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", gptq, "gptq", [f"{LAYER}.self_attn.q_proj"])
    lora = module_adapter(tmp_path / "adapter", "transformer.h.0.attn.c_attn")
    with pytest.raises(lorafast.LorafastError, match="fits no tensor of the base"):
        lorafast.plan(base, lora)
