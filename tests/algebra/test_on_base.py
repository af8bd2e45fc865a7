"""DoRA and others that change whole weights, baked and combined with their base."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._cli.main import main
from safetensors.numpy import load_file
from support.algebra import Array, distance, random_modules, updates_of, write_lora
from support.algorithms import ALGORITHMS, KEY, LAYERS, MODULE, based, generator, made, new_weight
from support.files import tensor, write_safetensors
from support.format_writers import Layer, Writer, mlx, peft
from support.handmade import make_base
from support.reference import PREFIX

SHAPES = {
    "model.layers.0.self_attn.q_proj": (24, 32),
    "model.layers.0.mlp.down_proj": (40, 24),
}
RANK = 3
ALPHA = 6.0


def base_of(directory: Path, dtype: str = "F32") -> tuple[Path, dict[str, Array]]:
    """A base, and its weights as they are stored, in float64."""
    base = make_base(directory, modules=SHAPES, dtype=dtype, scale=0.3)
    return base, weights_of(base)


def weights_of(model: Path) -> dict[str, Array]:
    from safetensors.torch import load_file as load

    found: dict[str, Array] = {}
    for file in sorted(model.glob("*.safetensors")):
        found |= {name: value.double().numpy() for name, value in load(file).items()}
    return found


def write_dora(
    directory: Path, weights: Mapping[str, Array], seed: int, **settings: Any
) -> tuple[Path, dict[str, Array]]:
    """A DoRA adapter of every module, and W' - W of each in float64."""
    random = np.random.default_rng(100 + seed)
    modules = random_modules(seed, SHAPES, RANK)
    adapter = write_lora(directory, modules, alpha=ALPHA, use_dora=True, **settings)
    tensors = load_file(adapter / "adapter_model.safetensors")
    changes = {}
    for name, (b, a) in modules.items():
        weight = weights[f"{name}.weight"]
        norms = np.linalg.norm(weight, axis=1)
        magnitude = (norms * random.uniform(0.8, 1.3, len(norms))).astype(np.float32)
        tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = magnitude
        total = weight + ALPHA / RANK * (b.astype(np.float64) @ a.astype(np.float64))
        scaled = magnitude.astype(np.float64) / np.linalg.norm(total, axis=1)
        changes[name] = scaled[:, None] * total - weight
    stored = {name: tensor(value, "F32") for name, value in tensors.items()}
    write_safetensors(adapter / "adapter_model.safetensors", stored)
    return adapter, changes


def cut(matrix: Array, rank: int) -> float:
    """The error of the best approximation of that rank."""
    sigma = np.linalg.svd(matrix, compute_uv=False)
    return float(np.sqrt(np.sum(sigma[rank:] ** 2) / np.sum(sigma**2)))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_dora_becomes_plain_without_loss(tmp_path: Path, dtype: str) -> None:
    base, weights = base_of(tmp_path / "base", dtype)
    dora, changes = write_dora(tmp_path / "dora", weights, 1)
    report = lorafast.bake(dora, tmp_path / "out", plain=True, base=base)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_dora"] is False
    found = distance(updates_of(tmp_path / "out"), changes)
    assert found < 2e-6
    assert report.error == pytest.approx(found, rel=0.2, abs=3e-7)
    assert any("W′ − W" in note for note in report.notes)


@pytest.mark.parametrize("rank", [1, 4, "error:0.3", "energy:0.9", "sv_ratio:4", "sv_fro:0.9", 60])
def test_a_rank_cuts_what_is_made_of_whole_weights(tmp_path: Path, rank: int | str) -> None:
    base, weights = base_of(tmp_path / "base")
    dora, changes = write_dora(tmp_path / "dora", weights, 2)
    report = lorafast.bake(dora, tmp_path / "out", plain=True, base=base, rank=rank)
    written = updates_of(tmp_path / "out")
    for name, change in changes.items():
        record = report.modules[name]
        least = min(change.shape)
        sigma = np.linalg.svd(change, compute_uv=False)
        energy = np.cumsum(sigma**2) / np.sum(sigma**2)
        expected = {
            "error:0.3": int(np.argmax(np.sqrt(np.maximum(1 - energy, 0)) <= 0.3)) + 1,
            "energy:0.9": int(np.argmax(energy >= 0.9)) + 1,
            "sv_ratio:4": int(np.sum(sigma > sigma[0] / 4)),
            "sv_fro:0.9": int(np.argmax(np.sqrt(energy) >= 0.9)) + 1,
        }.get(str(rank), rank)
        assert record.rank == expected
        kept = min(record.rank, least)
        error = np.linalg.norm(written[name] - change) / np.linalg.norm(change)
        assert error == pytest.approx(cut(change, kept), abs=1e-6)
        assert record.error == pytest.approx(error, rel=1e-4, abs=3e-7)
        assert record.kept == pytest.approx(energy[kept - 1], abs=1e-6)
        assert record.norm == pytest.approx(np.linalg.norm(change), rel=1e-6)
        assert np.array(record.singular_values[:kept]) == pytest.approx(sigma[:kept], rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": "fold"},
        {"alpha": 5},
        {"pad_to": 48},
        {"gauge": "balanced"},
        {"gauge": "orthonormal", "dtype": "float64"},
        {"rslora": True},
        {"dtype": "bfloat16"},
        {"to": "mlx"},
    ],
)
def test_other_options_hold_for_what_became_plain(tmp_path: Path, options: dict[str, Any]) -> None:
    base, weights = base_of(tmp_path / "base")
    dora, changes = write_dora(tmp_path / "dora", weights, 3)
    report = lorafast.bake(dora, tmp_path / "out", plain=True, base=base, **options)
    if "to" in options:
        lorafast.convert(tmp_path / "out", tmp_path / "back", to="peft")
        found = distance(updates_of(tmp_path / "back"), changes)
    elif "dtype" in options:
        lorafast.bake(tmp_path / "out", tmp_path / "back", dtype="float32")
        found = distance(updates_of(tmp_path / "back"), changes)
    else:
        found = distance(updates_of(tmp_path / "out"), changes)
    assert found < (5e-3 if options.get("dtype") == "bfloat16" else 3e-6)
    assert report.error == pytest.approx(found, rel=0.3, abs=3e-7)
    if "pad_to" in options:
        assert set(report.ranks.values()) == {48}
    if "alpha" in options:
        assert {
            json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"]
        } == {5}


def peft_adapter(
    directory: Path, make: Callable[[], Any], dtype: str, *, kind: str = "llama"
) -> tuple[Path, dict[str, Array], dict[str, Array]]:
    """An adapter that PEFT made of a small model: the base's weights and those of PEFT's merge."""
    import torch
    from peft import get_peft_model
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    torch.manual_seed(0)
    model: Any
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        model = LlamaForCausalLM(
            LlamaConfig(**sizes, vocab_size=64, num_attention_heads=4, num_key_value_heads=2)
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=16)
        )
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(directory / "base")
    tuned = get_peft_model(model, make())
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                step = 0.05 * torch.randn_like(parameter)
                parameter.add_(step * (parameter.abs() if "magnitude" in name else 1))
    # As PEFT does by itself where embeddings are updated.
    embeds = "embed_tokens" in (tuned.peft_config["default"].target_modules or ())
    tuned.save_pretrained(directory / "a", save_embedding_layers=embeds)
    merged = tuned.merge_and_unload()
    before = weights_of(directory / "base")
    after = {
        name: value.detach().double().numpy()
        for name, value in merged.state_dict().items()
        if name in before
    }
    return directory / "a", before, after


def methods() -> dict[str, tuple[str, Callable[[], Any]]]:
    from peft import IA3Config, LoraConfig, OFTConfig

    targets = ["q_proj", "down_proj"]
    return {
        "dora": (
            "llama",
            lambda: LoraConfig(
                r=4, lora_alpha=6, target_modules=[*targets, "embed_tokens"], use_dora=True
            ),
        ),
        "dora, rslora": (
            "llama",
            lambda: LoraConfig(r=4, target_modules=targets, use_dora=True, use_rslora=True),
        ),
        "dora, stored transposed": (
            "gpt2",
            lambda: LoraConfig(r=4, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True),
        ),
        "ia3": (
            "llama",
            lambda: IA3Config(target_modules=targets, feedforward_modules=["down_proj"]),
        ),
        "ia3, with a bias": (
            "gpt2",
            lambda: IA3Config(
                target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True
            ),
        ),
        "oft": ("llama", lambda: OFTConfig(r=0, oft_block_size=8, target_modules=targets)),
    }


@pytest.mark.parametrize(
    "name", ["dora", "dora, rslora", "dora, stored transposed", "ia3", "ia3, with a bias", "oft"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_peft_merges_is_what_the_plain_adapter_adds(
    tmp_path: Path, name: str, dtype: str
) -> None:
    kind, make = methods()[name]
    adapter, before, after = peft_adapter(tmp_path, make, dtype, kind=kind)
    report = lorafast.bake(
        adapter, tmp_path / "out", plain=True, base=tmp_path / "base", dtype="float32"
    )
    assert report.error < 2e-6
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config.get("use_dora")) == ("LORA", False)
    lorafast.merge(tmp_path / "base", tmp_path / "out", tmp_path / "merged")
    found = weights_of(tmp_path / "merged")
    changed = [key for key in before if not np.array_equal(after[key], before[key])]
    assert changed
    for key in changed:
        size = np.linalg.norm(after[key] - before[key])
        # PEFT merges in the model's type.
        bound = 2e-5 if dtype == "float32" else 0.3
        assert np.linalg.norm(found[key] - after[key]) / size < bound, key


def test_what_is_made_of_whole_weights_needs_its_base(tmp_path: Path) -> None:
    base, weights = base_of(tmp_path / "base")
    dora, _ = write_dora(tmp_path / "dora", weights, 1)
    plain = write_lora(tmp_path / "a", random_modules(5, SHAPES, 2), alpha=3)
    with pytest.raises(lorafast.UnsupportedAdapterError, match="--base"):
        lorafast.bake(dora, tmp_path / "out", plain=True)
    with pytest.raises(lorafast.UnsupportedAdapterError, match="--base"):
        lorafast.combine([plain, dora], tmp_path / "out")
    for rank, message in (
        ("auto", "full rank"),
        ("budget:ranks=3", "resize"),
        ("sv_cumulative:0.9", "energy"),
    ):
        with pytest.raises(ValueError, match=message):
            lorafast.bake(dora, tmp_path / "out", plain=True, base=base, rank=rank)
    with pytest.raises(ValueError, match="full rank"):
        lorafast.combine([plain, dora], tmp_path / "out", base=base, rank="auto")
    with pytest.raises(ValueError, match="resize cuts"):
        lorafast.bake(dora, tmp_path / "out", rank=3)
    with pytest.raises(ValueError, match="resize cuts"):
        lorafast.bake(plain, tmp_path / "out", plain=True, base=base, rank=3)
    with pytest.raises(ValueError, match="resize cuts"):
        lorafast.bake(dora, tmp_path / "out", plain=True, base=base, pad_to=4)
    for method in ("knots", "core_space", "tsv_m", "iso_c"):
        with pytest.raises(ValueError, match="--plain --base"):
            lorafast.combine([plain, dora], tmp_path / "out", base=base, method=method)
    assert not (tmp_path / "out").exists()


def test_a_large_change_of_full_rank_asks_for_a_rank(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    base = make_base(tmp_path / "base", modules={name: (700, 600)}, scale=0.3)
    tensors = {f"{PREFIX}{name}.ia3_l": np.random.default_rng(0).uniform(0.5, 2, (700, 1))}
    adapter = tmp_path / "ia3"
    adapter.mkdir()
    stored = {key: tensor(value, "F32") for key, value in tensors.items()}
    write_safetensors(adapter / "adapter_model.safetensors", stored)
    settings = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="give a rank"):
        lorafast.bake(adapter, tmp_path / "out", plain=True, base=base)
    report = lorafast.bake(adapter, tmp_path / "out", plain=True, base=base, rank=32)
    weight = weights_of(base)[f"{name}.weight"]
    change = (tensors[f"{PREFIX}{name}.ia3_l"].astype(np.float32) - 1.0) * weight
    found = distance(updates_of(tmp_path / "out"), {name: change})
    assert report.error == pytest.approx(found, rel=1e-5)
    # The randomized triplets come near the best of that rank, even of a flat spectrum.
    assert cut(change, 32) - 1e-9 <= found < 1.01 * cut(change, 32)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(
    ("method", "options", "weights"),
    [
        ("linear", {}, [1.0, -0.5, 0.7]),
        ("normalized", {}, [3.0, 1.0, 2.0]),
        ("centroid", {}, None),
    ],
)
def test_the_merged_combination_is_the_merge(
    tmp_path: Path, dtype: str, method: Any, options: dict[str, Any], weights: list[float] | None
) -> None:
    base, before = base_of(tmp_path / "base", dtype)
    adapters = [
        write_dora(tmp_path / "1", before, 1)[0],
        write_lora(tmp_path / "2", random_modules(2, SHAPES, 2), alpha=1),
        write_dora(tmp_path / "3", before, 3)[0],
    ]
    report = lorafast.combine(
        adapters, tmp_path / "all", method=method, options=options, weights=weights, base=base
    )
    assert report.error < 2e-6
    asked: dict[str, Any] = {"strategy": method, "weights": weights}
    lorafast.merge(base, tmp_path / "all", tmp_path / "one", dtype="float32")
    lorafast.merge(base, adapters, tmp_path / "two", dtype="float32", **asked)
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name in SHAPES:
        key = f"{name}.weight"
        change = np.linalg.norm(two[key] - before[key])
        assert np.linalg.norm(one[key] - two[key]) / change < 5e-6, key


def test_methods_see_the_change_of_the_whole_weight(tmp_path: Path) -> None:
    base, before = base_of(tmp_path / "base")
    dora, first = write_dora(tmp_path / "1", before, 1)
    lora = write_lora(tmp_path / "2", random_modules(2, SHAPES, 2), alpha=1)
    second = updates_of(lora)
    lorafast.combine(
        [dora, lora], tmp_path / "slerp", method="slerp", options={"t": 0.25}, base=base
    )
    lorafast.combine(
        [dora, lora], tmp_path / "ties", method="ties", options={"density": 0.5}, base=base, rank=24
    )
    found = {name: updates_of(tmp_path / name) for name in ("slerp", "ties")}
    for name in SHAPES:
        x, y = first[name], second[name]
        angle = np.arccos(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y))
        wanted = (np.sin(0.75 * angle) * x + np.sin(0.25 * angle) * y) / np.sin(angle)
        assert distance({name: found["slerp"][name]}, {name: wanted}) < 2e-6
        trimmed = []
        for change in (x, y):
            size = np.abs(change).ravel()
            kept = np.zeros(size.size, bool)
            kept[np.argsort(-size, kind="stable")[: size.size // 2]] = True
            trimmed.append(np.where(kept.reshape(change.shape), change, 0))
        sign = np.where(trimmed[0] + trimmed[1] >= 0, 1, -1)
        agree = [np.where(one * sign > 0, one, 0) for one in trimmed]
        count = sum((one != 0).astype(int) for one in agree)
        wanted = (agree[0] + agree[1]) / np.maximum(count, 1)
        assert distance({name: found["ties"][name]}, {name: wanted}) < 2e-6


def test_a_sum_is_cut_to_a_rank_and_a_budget(tmp_path: Path) -> None:
    base, before = base_of(tmp_path / "base")
    dora, first = write_dora(tmp_path / "1", before, 1)
    lora = write_lora(tmp_path / "2", random_modules(2, SHAPES, 2), alpha=1)
    total = {name: first[name] - 2 * update for name, update in updates_of(lora).items()}
    report = lorafast.combine([dora, lora], tmp_path / "out", weights=[1, -2], base=base, rank=5)
    for name, wanted in total.items():
        assert report.modules[name].error == pytest.approx(cut(wanted, 5), rel=1e-3)
        assert report.modules[name].coefficients == (1.0, -2.0)
    found = distance(updates_of(tmp_path / "out"), total)
    assert report.error == pytest.approx(found, rel=1e-4)
    spent = lorafast.combine(
        [dora, lora], tmp_path / "few", weights=[1, -2], base=base, rank="budget:ranks=12"
    )
    assert sum(spent.ranks.values()) == 12
    sigma = sorted(
        (value for wanted in total.values() for value in np.linalg.svd(wanted, compute_uv=False)),
        reverse=True,
    )
    kept = np.sum(np.array(sigma[:12]) ** 2) / np.sum(np.array(sigma) ** 2)
    assert spent.error == pytest.approx(np.sqrt(1 - kept), rel=1e-3)


def test_one_dora_alone_is_its_plain_adapter_and_threads_do_not_matter(tmp_path: Path) -> None:
    base, before = base_of(tmp_path / "base")
    dora, changes = write_dora(tmp_path / "1", before, 1)
    for threads in (1, 2):
        lorafast.combine([dora], tmp_path / f"c{threads}", base=base, threads=threads)
        lorafast.bake(
            dora, tmp_path / f"b{threads}", plain=True, base=base, threads=threads, rank=4
        )
    assert distance(updates_of(tmp_path / "c1"), changes) < 2e-6
    for kind in "cb":
        one, two = (
            (tmp_path / f"{kind}{threads}" / "adapter_model.safetensors").read_bytes()
            for threads in (1, 2)
        )
        assert one == two


def test_what_began_with_the_base_is_combined_with_it(tmp_path: Path) -> None:
    from peft import LoraConfig

    adapter, before, after = peft_adapter(
        tmp_path,
        lambda: LoraConfig(
            r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa"
        ),
        "float32",
    )
    base = tmp_path / "base"
    report = lorafast.combine([adapter], tmp_path / "out", weights=[0.5], base=base)
    assert set(report.ranks.values()) == {8}
    lorafast.merge(base, tmp_path / "out", tmp_path / "one")
    lorafast.merge(base, adapter, tmp_path / "two", weights=[0.5])
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name, weight in two.items():
        assert one[name] == pytest.approx(weight, abs=2e-6), name
    assert before.keys() == after.keys()


def test_the_command_makes_plain_factors_and_a_rehearsal_writes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, before = base_of(tmp_path / "base")
    dora, changes = write_dora(tmp_path / "dora", before, 1)
    flags = ["--plain", "--base", str(base), "--rank", "4", "-o", str(tmp_path / "out"), "--json"]
    assert main(["bake", str(dora), *flags, "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    assert main(["bake", str(dora), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["error"] == told["error"]
    assert told["error"] == pytest.approx(distance(updates_of(tmp_path / "out"), changes), rel=1e-4)
    lora = write_lora(tmp_path / "a", random_modules(2, SHAPES, 2), alpha=1)
    both = ["combine", str(dora), str(lora), "--base", str(base), "-o", str(tmp_path / "both")]
    assert main([*both, "--rank", "energy:0.99", "--dry-run"]) == 0
    assert not (tmp_path / "both").exists()
    assert main([*both, "--rank", "energy:0.99"]) == 0
    provenance = json.loads((tmp_path / "both" / "adapter_provenance.json").read_text())
    assert [len(one["sha256"]) for one in provenance["inputs"]] == [64, 64]


BY_WEIGHTS = {
    name: ALGORITHMS[name].kinds
    for name in (
        "dora",
        "dora, inputs",
        "glora",
        "ia3, outputs",
        "ia3, inputs",
        "oft",
        "oft, constrained",
        "boft",
    )
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name, kinds in BY_WEIGHTS.items() for kind in kinds if kind != "norm"],
)
def test_every_algorithm_of_weights_becomes_plain(tmp_path: Path, name: str, kind: str) -> None:
    base, weight = based(tmp_path / "base", LAYERS[kind], "F32")
    tensors, parts = made(name, kind, "F32")
    adapter = tmp_path / "adapter.safetensors"
    write_safetensors(adapter, {f"{KEY}.{part}": value for part, value in tensors.items()})
    after = new_weight(name, parts, weight)
    report = lorafast.bake(adapter, tmp_path / "out.safetensors", plain=True, base=base, to="kohya")
    size = np.linalg.norm(after - weight)
    assert report.error < 2e-6
    (record,) = report.modules.values()
    assert record.norm == pytest.approx(size, rel=1e-5)
    lorafast.merge(base, tmp_path / "out.safetensors", tmp_path / "merged")
    found = weights_of(tmp_path / "merged")[f"{MODULE}.weight"]
    assert np.linalg.norm(found - after) / size < 1e-5


@pytest.mark.parametrize(
    ("write", "name"), [(peft(), "dora, of tokens"), (mlx(), "dora, for each token")]
)
def test_embeddings_become_plain(tmp_path: Path, write: Writer, name: str) -> None:
    module = "model.embed_tokens"
    weight = tensor(generator(module).normal(size=LAYERS["embedding"]), "F32")
    base = make_base(tmp_path / "base", modules={}, others={f"{module}.weight": weight})
    tensors, parts = made(name, "embedding", "F32")
    (tmp_path / "a").mkdir()
    rank = ALGORITHMS[name].rank
    adapter = write(tmp_path / "a", Layer((module,), "embedding", name, rank, tensors))
    after = new_weight(name, parts, weight.float64())
    lora = tmp_path / "lora"
    lora.mkdir()
    others, own = made("lora, of tokens", "embedding", "F32")
    peft()(lora, Layer((module,), "embedding", "lora, of tokens", 4, others))
    lorafast.bake(adapter, tmp_path / "out", plain=True, base=base)
    lorafast.combine([adapter, lora], tmp_path / "both", base=base, weights=[1, 0.5])
    total = 0.5 * (new_weight("lora, of tokens", own, weight.float64()) - weight.float64())
    for out, wanted in (("out", after), ("both", after + total)):
        lorafast.merge(base, tmp_path / out, tmp_path / f"{out} merged")
        found = weights_of(tmp_path / f"{out} merged")[f"{module}.weight"]
        assert found == pytest.approx(wanted, abs=2e-5)
