"""Baking adapters: other factors, the same update."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._cli.main import main
from safetensors.numpy import load_file
from support.algebra import distance, random_modules, updates_of, write_lora

SHAPES = {
    "model.layers.0.self_attn.q_proj": (24, 32),
    "model.layers.0.mlp.down_proj": (32, 40),
}
RANKS = dict(zip(SHAPES, (4, 6), strict=True))


def config_of(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": "fold"},
        {"alpha": 16},
        {"alpha": 5},
        {"rslora": True},
        {"rslora": False},
        {"pad_to": 9},
        {"pad_to": 9, "rslora": True},
        {"gauge": "balanced"},
        {"gauge": "orthonormal", "dtype": "float64"},
        {"scale": "fold", "gauge": "balanced", "pad_to": 8, "dtype": "float64"},
    ],
)
@pytest.mark.parametrize("stabilized", [False, True])
def test_the_update_stays_what_it_is(
    tmp_path: Path, options: dict[str, Any], stabilized: bool
) -> None:
    modules = random_modules(1, SHAPES, RANKS)
    adapter = write_lora(tmp_path / "a", modules, alpha=6, use_rslora=stabilized)
    report = lorafast.bake(adapter, tmp_path / "out", **options)
    found = distance(updates_of(tmp_path / "out"), updates_of(adapter))
    assert found <= 1e-7
    assert report.error == pytest.approx(found, rel=1e-3, abs=1e-14)
    config = config_of(tmp_path / "out")
    if options.get("scale") == "fold":
        assert config["lora_alpha"] == config["r"]
        assert config["alpha_pattern"] == config["rank_pattern"]
    if "alpha" in options:
        assert (config["lora_alpha"], config["alpha_pattern"]) == (options["alpha"], {})
    if "pad_to" in options:
        assert set(report.ranks.values()) == {options["pad_to"]}
    if "rslora" in options:
        assert config["use_rslora"] is options["rslora"]


def test_what_needs_no_rounding_is_exact(tmp_path: Path) -> None:
    modules = random_modules(1, SHAPES, RANKS, dtype=np.float16)
    adapter = write_lora(tmp_path / "a", modules, alpha=6)
    for options in ({"pad_to": 12}, {"gauge": "balanced"}, {"rslora": True}, {"rslora": False}):
        report = lorafast.bake(adapter, tmp_path / "out", overwrite=True, **options)  # type: ignore[arg-type]
        assert report.error == 0, options
        assert report.dtype == "float16"
    power = write_lora(tmp_path / "b", random_modules(1, SHAPES, 4, dtype=np.float16), alpha=8)
    assert lorafast.bake(power, tmp_path / "out", overwrite=True, scale="fold").error == 0


def test_balanced_factors_have_one_size(tmp_path: Path) -> None:
    modules = {name: (b * 1e-4, a * 300) for name, (b, a) in random_modules(1, SHAPES, 4).items()}
    modules = {
        name: (b.astype(np.float32), a.astype(np.float32)) for name, (b, a) in modules.items()
    }
    adapter = write_lora(tmp_path / "a", modules, alpha=4)
    lorafast.bake(adapter, tmp_path / "out", gauge="balanced")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, a in tensors.items():
        if "lora_A" not in name:
            continue
        b = tensors[name.replace("lora_A", "lora_B")]
        quotient = np.linalg.norm(b, axis=0) / np.linalg.norm(a, axis=1)
        assert np.all(np.abs(np.log2(quotient)) <= 1.0001), quotient


def test_orthonormal_factors_have_diagonal_grams(tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "a", random_modules(1, SHAPES, 5), alpha=5)
    lorafast.bake(adapter, tmp_path / "out", gauge="orthonormal", scale="fold", dtype="float64")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, update in updates_of(adapter).items():
        a = tensors[f"base_model.model.{name}.lora_A.weight"]
        b = tensors[f"base_model.model.{name}.lora_B.weight"]
        sigma = np.linalg.svd(update, compute_uv=False)[:5]
        assert b.T @ b == pytest.approx(np.diag(sigma), abs=1e-10 * sigma[0])
        assert a @ a.T == pytest.approx(np.diag(sigma), abs=1e-10 * sigma[0])
        assert all(b[np.argmax(np.abs(b[:, k])), k] > 0 for k in range(5))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_began_with_the_base_becomes_plain(tmp_path: Path, start: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = tmp_path / "base"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    model.save_pretrained(base)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=start
    )
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    peft.save_pretrained(tmp_path / "a")
    report = lorafast.bake(tmp_path / "a", tmp_path / "out", plain=True, base=base)
    assert set(report.ranks.values()) == {8}
    assert config_of(tmp_path / "out")["init_lora_weights"] is True
    lorafast.merge(base, tmp_path / "a", tmp_path / "one")
    lorafast.merge(base, tmp_path / "out", tmp_path / "two")
    one = load_file(tmp_path / "one" / "model.safetensors")
    two = load_file(tmp_path / "two" / "model.safetensors")
    for name, weight in one.items():
        assert two[name] == pytest.approx(weight, abs=2e-6), name
    with pytest.raises(lorafast.UnsupportedAdapterError, match="base"):
        lorafast.bake(tmp_path / "a", tmp_path / "no", plain=True)
    with pytest.raises(lorafast.UnsupportedAdapterError, match="PiSSA, OLoRA"):
        lorafast.bake(tmp_path / "a", tmp_path / "no", base=base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "one"}, "scale is"),
        ({"gauge": "even"}, "gauge is"),
        ({"scale": "fold", "alpha": 3}, "give one of them"),
        ({"alpha": 0}, "above zero"),
        ({"alpha": float("inf")}, "finite"),
        ({"pad_to": 3}, "resize cuts"),
        ({"rslora": True, "to": "mlx"}, "only PEFT"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    adapter = write_lora(tmp_path / "a", random_modules(1, SHAPES, RANKS), alpha=6)
    with pytest.raises(ValueError, match=message):
        lorafast.bake(adapter, tmp_path / "out", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_a_type_that_is_too_narrow_is_refused_and_a_narrow_one_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_lora(tmp_path / "a", random_modules(1, SHAPES, RANKS), alpha=6)
    flags = ["--dtype", "bfloat16", "-o", str(tmp_path / "out"), "--json"]
    assert main(["bake", str(adapter), *flags]) == 0
    assert 1e-3 < json.loads(capsys.readouterr().out)["error"] < 5e-3
    large = {name: (b * 1e5, a) for name, (b, a) in random_modules(1, SHAPES, RANKS).items()}
    large = {name: (b.astype(np.float32), a) for name, (b, a) in large.items()}
    adapter = write_lora(tmp_path / "b", large, alpha=6)
    with pytest.raises(ValueError, match="too large for"):
        lorafast.bake(adapter, tmp_path / "no", dtype="float16")
    assert not (tmp_path / "no").exists()
