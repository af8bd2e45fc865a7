"""Adapters extracted from two checkpoints, held against dense decompositions in float64."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.analysis import write_factors
from support.files import Tensor, read_checkpoint, read_safetensors, snapshot, tensor
from support.handmade import write_checkpoint
from support.quantised import four_bit, fp8
from support.reference import read_updates

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
SHAPES = {Q: (160, 128), UP: (240, 96)}


def write_model(
    path: Path, tensors: Mapping[str, Tensor], *, shards: int = 1, **config: Any
) -> Path:
    path.mkdir()
    write_checkpoint(path, tensors, shards=shards)
    settings = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    settings |= {"tie_word_embeddings": False} | config
    (path / "config.json").write_text(json.dumps(settings))
    return path


def weights(dtype: str = "BF16", scales: str = "even", seed: int = 0) -> dict[str, Tensor]:
    random = np.random.default_rng(seed)
    found = {}
    for name, shape in SHAPES.items():
        values = random.normal(scale=0.02, size=shape)
        if scales == "rows":
            values *= random.lognormal(sigma=1, size=(shape[0], 1))
        if scales == "columns":
            values[:, :4] *= 50
        found[f"{name}.weight"] = tensor(values, dtype)
    return found


def low_rank(
    shape: tuple[int, int], rank: int, size: float, random: np.random.Generator
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """An update of that rank whose elements have that root mean square."""
    update = random.normal(size=(shape[0], rank)) @ random.normal(size=(rank, shape[1]))
    return np.asarray(update * (size / np.sqrt(np.mean(update**2))))


def tuned(
    base: Mapping[str, Tensor], rank: int = 4, size: float = 7.2e-4, seed: int = 1
) -> dict[str, Tensor]:
    random = np.random.default_rng(seed)
    found = dict(base)
    for name, shape in SHAPES.items():
        weight = base[f"{name}.weight"]
        values = weight.float64() + low_rank(shape, rank, size, random)
        found[f"{name}.weight"] = tensor(values, weight.dtype)
    return found


def products(adapter: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """s·B·A of each module, by NumPy."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    found = {}
    tensors = read_safetensors(adapter / "adapter_model.safetensors")
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")].float64()
            key = "^" + module.replace(".", r"\.") + "$"
            rank = config["rank_pattern"].get(key, config["r"])
            assert a.shape[0] == rank
            assert config["alpha_pattern"].get(key, config["lora_alpha"]) == rank
            found[module] = b @ a.float64()
    return found


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("scales", ["even", "rows", "columns"])
def test_what_was_merged_comes_back(tmp_path: Path, dtype: str, scales: str) -> None:
    random = np.random.default_rng(3)
    base = weights(dtype, scales)
    factors = {}
    for module, (rows, columns) in SHAPES.items():
        b, a = random.normal(size=(rows, 6)), random.normal(size=(6, columns))
        size = np.sqrt(np.mean(base[f"{module}.weight"].float64() ** 2)) * 0.036
        factors[module] = (b * (size / np.sqrt(np.mean((b @ a) ** 2))), a)
    write_model(tmp_path / "base", base)
    adapter = write_factors(tmp_path / "adapter", factors, dtype="F32")
    lorafast.merge(tmp_path / "base", [adapter], tmp_path / "tuned")
    report = lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    assert report.ranks == dict.fromkeys(SHAPES, 6)
    assert report.dtype == {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype]
    merged = read_checkpoint(tmp_path / "tuned")
    for module, product in products(tmp_path / "out").items():
        b, a = factors[module]
        cosine = np.sum(product * (b @ a)) / np.linalg.norm(product) / np.linalg.norm(b @ a)
        assert cosine >= 0.999
        if scales == "even":
            assert cosine >= 0.9999
        difference = merged[f"{module}.weight"].float64() - base[f"{module}.weight"].float64()
        error = np.linalg.norm(difference - product) / np.linalg.norm(difference)
        found = report.modules[module]
        # What is cut and what rounding takes are nearly orthogonal, and counted so.
        assert found.error == pytest.approx(error, rel=1e-2 if dtype == "F32" else 1e-3)
        assert found.norm == pytest.approx(np.linalg.norm(difference), rel=1e-6)
        sigma = np.linalg.svd(difference, compute_uv=False)
        np.testing.assert_allclose(found.singular_values[:6], sigma[:6], rtol=1e-5)
        assert sigma[6] < report.floor[module] < sigma[5]
        assert report.extraction[module].mean_floor <= report.floor[module] * 1.001
        above = np.sum(sigma[:6] ** 2) / np.sum(sigma**2)
        # An iteration more would take a hundredth of what is left at most.
        assert report.extraction[module].energy_above <= above + 1e-9
        assert report.extraction[module].energy_above >= above - 1e-2 * (1 - above) - 1e-8
    assert not list(tmp_path.glob(".out*"))


def test_the_floor_counts_the_rounding_of_both(tmp_path: Path) -> None:
    base = weights("BF16")
    other = tuned(base)
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", other)
    report = lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    for module in SHAPES:
        variance = 0.0
        for each in (base, other):
            values = np.abs(each[f"{module}.weight"].float64())
            ulp = np.where(values == 0, 0, 2.0 ** (np.floor(np.log2(values)) - 7))
            variance = variance + ulp**2 / 12
        bound = np.sqrt(np.max(variance.sum(1))) + np.sqrt(np.max(variance.sum(0)))
        assert report.floor[module] == pytest.approx(bound, rel=1e-5)
        edge = np.sqrt(np.mean(variance)) * sum(np.sqrt(variance.shape))
        assert report.extraction[module].mean_floor == pytest.approx(edge, rel=1e-5)


def test_certificates_hold_against_the_best_approximation(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    base = {f"m{i}.weight": tensor(np.zeros((90, 70)), "F32") for i in range(12)}
    other = {}
    for index, name in enumerate(base):
        left, _ = np.linalg.qr(random.normal(size=(90, 70)))
        right, _ = np.linalg.qr(random.normal(size=(70, 70)))
        sigma = [1.0 / np.arange(1, 71), 0.7 ** np.arange(70), np.ones(70)][index % 3]
        other[name] = tensor(left * sigma @ right, "F32")
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", other)
    for rank in (1, 5, 12):
        report = lorafast.extract(
            tmp_path / "tuned", tmp_path / "base", tmp_path / f"out{rank}", rank=rank
        )
        for name, value in other.items():
            module = name.removesuffix(".weight")
            sigma = np.linalg.svd(value.float64(), compute_uv=False)
            best = np.sum(sigma[rank:] ** 2) / np.sum(sigma**2)
            excess = report.modules[module].error ** 2 - best
            assert excess <= report.certificate[module] + 1e-9
            assert 0 < report.certificate[module] < 1


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (3, 3),
        ("energy:0.9", 2),
        ("error:0.5", 1),
        ("error:0.3", 2),
        ("sv_fro:0.95", 2),
        ("sv_ratio:5", 3),
        ("sv_ratio:20", 4),
    ],
)
def test_rules_choose_as_for_a_dense_decomposition(
    tmp_path: Path, rule: int | str, wanted: int
) -> None:
    signs = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    difference = np.kron(signs @ np.diag([16, 8, 4, 1]) @ signs.T, np.eye(1))
    write_model(tmp_path / "base", {"m.weight": tensor(np.zeros((4, 4)))})
    write_model(tmp_path / "tuned", {"m.weight": tensor(difference)})
    report = lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=rule)
    assert report.ranks == {"m": wanted}
    np.testing.assert_allclose(report.modules["m"].singular_values, [64, 32, 16, 4])
    capped = lorafast.extract(
        tmp_path / "tuned", tmp_path / "base", tmp_path / "capped", rank=rule, max_rank=1
    )
    assert capped.ranks == {"m": 1}


def test_a_spectrum_longer_than_the_first_try_is_followed(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    base = {"m.weight": tensor(np.zeros((300, 260)), "F32")}
    write_model(tmp_path / "base", base)
    other = {"m.weight": tensor(low_rank((300, 260), 100, 1.0, random), "F32")}
    write_model(tmp_path / "tuned", other)
    report = lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    assert report.ranks == {"m": 100}
    sigma = np.linalg.svd(other["m.weight"].float64(), compute_uv=False) ** 2
    wanted = int(np.searchsorted(np.cumsum(sigma) / sigma.sum(), 0.9)) + 1
    energy = lorafast.extract(
        tmp_path / "tuned", tmp_path / "base", tmp_path / "energy", rank="energy:0.9"
    )
    assert energy.ranks == {"m": wanted}


def test_budgets_are_spent_over_all_modules(tmp_path: Path) -> None:
    base = weights("F32")
    other = tuned(base, rank=8)
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", other)
    report = lorafast.extract(
        tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank="budget:ranks=9"
    )
    values = []
    for module in SHAPES:
        weight = f"{module}.weight"
        sigma = np.linalg.svd(other[weight].float64() - base[weight].float64(), compute_uv=False)
        values += [(value, module) for value in sigma]
    largest = [module for _, module in sorted(values, reverse=True)[:9]]
    assert report.ranks == {module: largest.count(module) for module in SHAPES}
    assert report.budget is not None
    assert (report.budget.spent, report.budget.gap) == (9, 0)
    assert sum(report.ranks.values()) == 9
    for module, product in products(tmp_path / "out").items():
        weight = f"{module}.weight"
        difference = other[weight].float64() - base[weight].float64()
        error = np.linalg.norm(difference - product) / np.linalg.norm(difference)
        assert report.modules[module].error == pytest.approx(error, rel=1e-5)
    small = lorafast.extract(
        tmp_path / "tuned",
        tmp_path / "base",
        tmp_path / "small",
        rank="budget:bytes=4kB",
        dtype="bfloat16",
    )
    assert 0 < small.bytes <= 4000
    with pytest.raises(ValueError, match="leaves room for nothing"):
        lorafast.extract(
            tmp_path / "tuned", tmp_path / "base", tmp_path / "none", rank="budget:parameters=9"
        )


def test_shards_threads_and_files_do_not_matter(tmp_path: Path) -> None:
    base = weights("BF16")
    other = tuned(base)
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", other)
    write_model(tmp_path / "sharded", dict(reversed(list(other.items()))), shards=2)
    found = []
    for index, (model, threads) in enumerate(
        [("tuned", 1), ("tuned", 2), ("tuned", 7), ("sharded", 2)]
    ):
        output = tmp_path / f"out{index}"
        lorafast.extract(tmp_path / model, tmp_path / "base", output, threads=threads)
        found.append(products(output))
        if index:
            for module, product in found[0].items():
                assert np.array_equal(product, found[-1][module])
    first, second = (snapshot(tmp_path / f"out{index}") for index in (0, 2))
    assert first == second
    other_seed = lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "seed", seed=1)
    for module, product in products(tmp_path / "seed").items():
        np.testing.assert_allclose(product, found[0][module], atol=1e-4)
        assert other_seed.ranks[module] == 4


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_codes_are_read_as_the_numbers_that_they_mean(tmp_path: Path, kind: str) -> None:
    scheme = (
        four_bit("nf4", nested=False)
        if kind == "nf4"
        else fp8(
            "fp8", (128, 128), scale_shape=lambda shape: (-(-shape[0] // 128), -(-shape[1] // 128))
        )
    )
    plain = weights("F32")
    random = np.random.default_rng(4)
    stored: dict[str, Tensor] = {}
    other, exact = {}, {}
    for module, shape in SHAPES.items():
        name = f"{module}.weight"
        codes = scheme.quantise(name, plain[name].float64())
        stored |= codes
        exact[module] = scheme.dequantise(codes, name, shape)
        other[name] = tensor(exact[module] + low_rank(shape, 3, 5e-3, random), "F32")
    write_model(tmp_path / "base", stored, quantization_config=dict(scheme.config))
    write_model(tmp_path / "tuned", other)
    report = lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=3)
    for module, product in products(tmp_path / "out").items():
        difference = other[f"{module}.weight"].float64() - exact[module]
        error = np.linalg.norm(difference - product) / np.linalg.norm(difference)
        assert error < 1e-5
        # The step of the codes is what nothing can be told below.
        assert report.floor[module] > 5e-3
        assert report.floor[module] > 20 * np.sqrt(np.mean(difference**2)) * 0.01


def test_parameters_that_have_no_factors_are_saved_whole(tmp_path: Path) -> None:
    random = np.random.default_rng(6)
    base = weights("F32")
    names = {
        "model.embed_tokens.weight": (30, 16),
        "lm_head.weight": (30, 16),
        "model.norm.weight": (16,),
        "model.norm.bias": (16,),
        "model.layers.0.input_layernorm.weight": (16,),
        f"{Q}.bias": (160,),
        f"{UP}.bias": (240,),
    }
    base |= {name: tensor(random.normal(size=shape), "F32") for name, shape in names.items()}
    other = tuned(base)
    changed = [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        f"{Q}.bias",
    ]
    for name in changed:
        other[name] = tensor(base[name].float64() + random.normal(size=names[name]), "F32")
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", other)
    report = lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    assert set(report.saved) == {*changed, "model.norm.bias"}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["modules_to_save"]) == {"model.embed_tokens", "lm_head", "model.norm"}
    assert config["bias"] == "all"
    assert set(config["target_modules"]) == set(SHAPES)
    keys = read_safetensors(tmp_path / "out" / "adapter_model.safetensors")
    assert f"base_model.model.{Q}.base_layer.bias" in keys
    lorafast.merge(tmp_path / "base", [tmp_path / "out"], tmp_path / "again")
    again = read_checkpoint(tmp_path / "again")
    for name in names:
        assert again[name].data == other[name].data, name
    for module in SHAPES:
        name = f"{module}.weight"
        np.testing.assert_allclose(again[name].float64(), other[name].float64(), atol=2e-8)
    with pytest.raises(
        lorafast.UnsupportedAdapterError, match=r"model\.norm\.weight.*q_proj\.bias"
    ):
        lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "no", strict=True)
    assert not list(tmp_path.glob(".no*"))
    assert not (tmp_path / "no").exists()
    factors = lorafast.extract(
        tmp_path / "tuned", tmp_path / "base", tmp_path / "f", rank=16, embeddings="factors"
    )
    assert factors.ranks["model.embed_tokens"] == factors.ranks["lm_head"] == 16
    updates = read_updates(tmp_path / "f")
    assert "model.embed_tokens" in updates
    lorafast.merge(tmp_path / "base", [tmp_path / "f"], tmp_path / "fagain")
    again = read_checkpoint(tmp_path / "fagain")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        np.testing.assert_allclose(again[name].float64(), other[name].float64(), atol=1e-5)


def test_peft_loads_what_is_saved_whole(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.1.mlp" not in name and "up_proj" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    report = lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=32)
    assert not report.lost
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        wanted = model.eval()(tokens).logits
        assert torch.allclose(loaded(tokens).logits, wanted, atol=1e-4)
        assert torch.allclose(loaded.merge_and_unload()(tokens).logits, wanted, atol=1e-4)


def test_grown_vocabularies_and_tied_heads(tmp_path: Path) -> None:
    random = np.random.default_rng(6)
    base = weights("BF16") | {
        "model.embed_tokens.weight": tensor(random.normal(size=(30, 16)), "BF16")
    }
    other = tuned(base)
    grown = np.concatenate([base["model.embed_tokens.weight"].float64(), np.ones((4, 16))])
    other["model.embed_tokens.weight"] = tensor(grown, "BF16")
    other["lm_head.weight"] = other["model.embed_tokens.weight"]
    write_model(tmp_path / "base", base, tie_word_embeddings=True)
    write_model(tmp_path / "tuned", other, tie_word_embeddings=True)
    report = lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    assert report.saved == ("model.embed_tokens.weight",)
    assert any("34 rows" in note for note in report.notes)
    saved = read_safetensors(tmp_path / "out" / "adapter_model.safetensors")
    assert saved["base_model.model.model.embed_tokens.weight"].shape == (34, 16)


def test_layers_that_are_stored_transposed_and_convolutions(tmp_path: Path) -> None:
    random = np.random.default_rng(8)
    shapes = {"h.0.attn.c_attn.weight": (24, 72), "h.0.mlp.c_proj.weight": (24, 24)}
    base = {name: tensor(random.normal(size=shape), "F32") for name, shape in shapes.items()}
    other = {
        name: tensor(value.float64() + low_rank(shapes[name], 2, 0.1, random), "F32")
        for name, value in base.items()
    }
    write_model(tmp_path / "base", base, model_type="gpt2")
    write_model(tmp_path / "tuned", other, model_type="gpt2")
    report = lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    assert report.ranks == {"h.0.attn.c_attn": 2, "h.0.mlp.c_proj": 2}
    assert report.modules["h.0.attn.c_attn"].shape == (72, 24)
    lorafast.merge(tmp_path / "base", [tmp_path / "out"], tmp_path / "again")
    again = read_checkpoint(tmp_path / "again")
    for name, value in other.items():
        np.testing.assert_allclose(again[name].float64(), value.float64(), atol=1e-5)

    kernel = {"conv_in.weight": tensor(random.normal(size=(20, 12, 3, 3)), "F32")}
    moved = random.normal(size=(20, 3)) @ random.normal(size=(3, 108))
    changed = kernel["conv_in.weight"].float64() + moved.reshape(20, 12, 3, 3)
    write_model(tmp_path / "unet", kernel)
    write_model(tmp_path / "unet_tuned", {"conv_in.weight": tensor(changed, "F32")})
    report = lorafast.extract(tmp_path / "unet_tuned", tmp_path / "unet", tmp_path / "conv")
    assert report.ranks == {"conv_in": 3}
    tensors = read_safetensors(tmp_path / "conv" / "adapter_model.safetensors")
    assert sorted(value.shape for value in tensors.values()) == [(3, 12, 3, 3), (20, 3, 1, 1)]


def test_other_formats_hold_it_too(tmp_path: Path) -> None:
    base = weights("F32")
    other = tuned(base)
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", other)
    report = lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", to="mlx")
    assert report.target_format == "mlx"
    lorafast.merge(tmp_path / "base", [tmp_path / "out"], tmp_path / "again")
    again = read_checkpoint(tmp_path / "again")
    for name, value in other.items():
        np.testing.assert_allclose(again[name].float64(), value.float64(), atol=2e-8)


def test_bad_input_is_said(tmp_path: Path) -> None:
    base = weights("BF16")
    other = tuned(base)
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", other)

    def fails(tuned: Path, match: str, error: type[Exception] = ValueError, **more: Any) -> None:
        with pytest.raises(error, match=match):
            lorafast.extract(tuned, tmp_path / "base", tmp_path / "out", **more)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))

    fails(tmp_path / "base", "are the same files")
    write_model(tmp_path / "copy", base)
    fails(tmp_path / "copy", "do not differ: there is nothing to extract")
    fails(tmp_path / "absent", "absent", FileNotFoundError)
    for rule in ("sv_cumulative:0.9", "0", "energy:2", "what"):
        fails(tmp_path / "tuned", "rank is|sv_cumulative", rank=rule)
    fails(tmp_path / "tuned", "max_rank is 0", max_rank=0)
    fails(tmp_path / "tuned", "embeddings is", embeddings="maybe")
    shapes = dict(other)
    shapes[f"{Q}.weight"] = tensor(np.zeros((8, 128)), "BF16")
    del shapes[f"{UP}.weight"]
    shapes["new.weight"] = tensor(np.zeros((8, 8)), "BF16")
    write_model(tmp_path / "shapes", shapes)
    with pytest.raises(lorafast.PlanError) as caught:
        lorafast.extract(tmp_path / "shapes", tmp_path / "base", tmp_path / "out")
    for part in ("not two states of one model", "[8, 128]", f"{UP}.weight", "new.weight"):
        assert part in str(caught.value)
    broken = dict(other)
    values = broken[f"{UP}.weight"].float64().copy()
    values[3, 5] = np.nan
    broken[f"{UP}.weight"] = tensor(values, "BF16")
    write_model(tmp_path / "broken", broken)
    fails(
        tmp_path / "broken",
        r"up_proj\.weight has values that are not finite",
        lorafast.CheckpointError,
    )
    # One step in the last place of one element is what rounding explains.
    noise = dict(base)
    bits = noise[f"{Q}.weight"].bits16().copy()
    bits[0, 0] += 1
    noise[f"{Q}.weight"] = Tensor("BF16", bits.shape, bits.tobytes())
    write_model(tmp_path / "noise", noise)
    fails(tmp_path / "noise", "rounding explains all that differs")
    kept = lorafast.extract(tmp_path / "noise", tmp_path / "base", tmp_path / "kept", rank=1)
    assert kept.modules[Q].error < 1e-2
    assert kept.unchanged == 1
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("x")
    with pytest.raises(lorafast.OutputError):
        lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "there")


def test_a_rehearsal_says_the_same_and_writes_nothing(tmp_path: Path) -> None:
    base = weights("BF16")
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", tuned(base))
    before = {path.name for path in tmp_path.iterdir()}
    dry = lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", dry_run=True)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert dry.files == ()
    report = lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    assert (report.ranks, report.error, report.bytes) == (dry.ranks, dry.error, dry.bytes)
    provenance = json.loads((tmp_path / "out" / "adapter_provenance.json").read_text())
    assert provenance["verb"] == "extract"
    assert provenance["parameters"]["rank"] == "auto"
    for given in provenance["inputs"]:
        (digest,) = given["sha256"].values()
        assert len(digest) == 64
    fields = json.loads(json.dumps(report.to_dict()))
    assert set(fields["extraction"]) == set(SHAPES)


SCRIPT = """
import sys, lorafast
report = lorafast.extract(sys.argv[1], sys.argv[2], sys.argv[3], threads=1)
print(report.resumed)
"""


def test_what_was_finished_before_a_kill_is_not_done_again(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    base, other = {}, {}
    for index in range(40):
        name = f"model.layers.{index}.mlp.up_proj.weight"
        values = random.normal(scale=0.02, size=(512, 384))
        base[name] = tensor(values, "BF16")
        other[name] = tensor(values + low_rank((512, 384), 4, 1e-3, random), "BF16")
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", other)
    arguments = [str(tmp_path / name) for name in ("tuned", "base")]
    whole = tmp_path / "whole"
    subprocess.run([sys.executable, "-c", SCRIPT, *arguments, str(whole)], check=True)
    output = tmp_path / "out"
    log = tmp_path / ".out.extract" / "finished.jsonl"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments, str(output)])
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") > 5:
            break
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed before it was finished"
    finished = log.read_bytes().count(b"\n") - 1
    assert finished >= 5
    # Of a line that was cut off nothing is taken.
    with log.open("ab") as file:
        file.write(b'{"name": "model.layers.39')
    again = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments, str(output)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(again.stdout) == finished
    assert not log.parent.exists()
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (whole / name).read_bytes()


def test_another_question_does_not_take_what_is_finished(tmp_path: Path) -> None:
    base = weights("BF16")
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", tuned(base))
    left = tmp_path / ".out.extract"
    left.mkdir()
    line = {"name": f"{Q}.weight", "differs": False, "layer": None}
    (left / "finished.jsonl").write_text(f"another key\n{json.dumps(line)}\n")
    (left / "data").write_bytes(b"")
    report = lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    assert report.resumed == 0
    assert report.ranks == dict.fromkeys(SHAPES, 4)


MEMORY = """
import sys, lorafast
lorafast.extract(sys.argv[1], sys.argv[2], sys.argv[3], rank=8, threads=2)
status = open("/proc/self/status").read().split()
print(int(status[status.index("VmHWM:") + 1]))
"""


@pytest.mark.alone
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    values = random.normal(scale=0.02, size=(1024, 1024))
    moved = values + low_rank((1024, 1024), 8, 1e-3, random)
    peaks = []
    for layers in (2, 40):
        names = [f"model.layers.{index}.mlp.up_proj.weight" for index in range(layers)]
        folder = tmp_path / str(layers)
        folder.mkdir()
        write_model(folder / "base", {name: tensor(values, "BF16") for name in names}, shards=2)
        write_model(folder / "tuned", {name: tensor(moved, "BF16") for name in names}, shards=2)
        arguments = [str(folder / name) for name in ("tuned", "base", "out")]
        found = subprocess.run(
            [sys.executable, "-c", MEMORY, *arguments], check=True, capture_output=True, text=True
        )
        peaks.append(int(found.stdout))
    # 38 layers more are 160 MB of weights.
    assert peaks[1] < peaks[0] + 16 * 1024


def test_the_command_extracts(tmp_path: Path) -> None:
    base = weights("BF16")
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", tuned(base))
    command = [sys.executable, "-m", "lorafast", "extract", "tuned", "base", "-o", "out"]
    dry = subprocess.run(
        [*command, "--rank", "3", "--dry-run", "--json"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    found = json.loads(dry.stdout)
    assert [module["rank"] for module in found["modules"].values()] == [3, 3]
    assert not (tmp_path / "out").exists()
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert "2 of 2 modules" in said
    assert "4 to 4, 8 in all" in said
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_other_stacks_are_saved_and_what_cannot_be_said_is_named(tmp_path: Path) -> None:
    random = np.random.default_rng(9)
    names = {
        "model.layers.0.mlp.stack.kernel": (3, 8, 12),
        "model.layers.0.mixer.A_log": (8,),
        "model.layers.0.mixer.in_proj.weight": (12, 8),
        "model.layers.0.mixer.conv1d.weight": (8, 1, 4),
    }
    base = {name: tensor(random.normal(size=shape), "F32") for name, shape in names.items()}
    other = {
        name: tensor(value.float64() + random.normal(size=names[name]), "F32")
        for name, value in base.items()
    }
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", other)
    report = lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=8)
    whole = {"model.layers.0.mlp.stack.kernel", "model.layers.0.mixer.conv1d.weight"}
    assert set(report.saved) == whole
    # Its module holds a layer that is updated, so that PEFT cannot save it.
    assert ["mixer.A_log" in lost for lost in report.lost] == [True]
    assert any("stacked weights are saved whole" in note for note in report.notes)
    saved = read_safetensors(tmp_path / "out" / "adapter_model.safetensors")
    for name in whole:
        assert saved[f"base_model.model.{name}"].data == other[name].data
    with pytest.raises(lorafast.UnsupportedAdapterError, match=r"stack\.kernel"):
        lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "no", strict=True)
    kohya = lorafast.extract(
        tmp_path / "tuned", tmp_path / "base", tmp_path / "k.gguf.safetensors", to="kohya", rank=8
    )
    assert kohya.saved == ()
    assert "stack.kernel" in kohya.lost[0]
