"""Lone files of image models' adapters: each trainer's names give what the formulas give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support import image_formats as toys
from support.image_formats import (
    CLIP,
    CLIP_MODULES,
    DOUBLE,
    FLUX,
    FLUX_MODULES,
    SINGLE,
    UNET,
    UNET_MODULES,
    Pair,
    Tensors,
    assert_equal,
    check,
    deltas_of,
    formats,
    merge,
    pairs_of,
    pipeline,
    save,
    sums,
    theirs,
    written,
)

# diffusers


@pytest.mark.parametrize(
    "prefix", ["transformer.", "transformer.base_model.model.", "base_model.model.", ""]
)
@pytest.mark.parametrize("spelling", ["", ".default"])
def test_diffusers_names_of_a_transformer(prefix: str, spelling: str, tmp_path: Path) -> None:
    pairs = pairs_of(FLUX, FLUX_MODULES)
    tensors = written(
        pairs, lambda name: prefix + name, f".lora_A{spelling}.weight", f".lora_B{spelling}.weight"
    )
    adapter = save(tmp_path / "a.safetensors", tensors)
    assert formats(adapter) == ("adapter", "diffusers")
    check("flux1", FLUX, adapter, theirs("flux1", FLUX, deltas_of(pairs)), tmp_path)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (".lora_A.weight", ".lora_B.weight"),
        (".lora.down.weight", ".lora.up.weight"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        ("_lora.down.weight", "_lora.up.weight"),
    ],
)
@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_diffusers_spellings_in_a_unet(down: str, up: str, prefix: str, tmp_path: Path) -> None:
    pairs = pairs_of(UNET, UNET_MODULES)

    def name(module: str) -> str:
        if not down.startswith("_"):
            return prefix + module
        module = module.removesuffix(".0")
        head, _, layer = module.rpartition(".")
        # Attention processors alone have that spelling.
        return prefix + (f"{head}.processor.{layer}" if ".attn" in module else module)

    if down.startswith("_"):
        pairs = {module: pair for module, pair in pairs.items() if ".attn" in module}
    adapter = save(tmp_path / "a.safetensors", written(pairs, name, down, up))
    assert formats(adapter) == ("adapter", "diffusers")
    check("sd1", UNET, adapter, theirs("sd1", UNET, deltas_of(pairs)), tmp_path)


@pytest.mark.parametrize("spelling", ["lora_A", "to_q_lora", "lora_linear_layer"])
def test_diffusers_pipelines_with_text_encoders(spelling: str, tmp_path: Path) -> None:
    unet, clip = pairs_of(UNET, UNET_MODULES[:2]), pairs_of(CLIP, CLIP_MODULES)
    tensors = written(unet, lambda name: f"unet.{name}")
    early = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

    def name(module: str) -> str:
        head, _, layer = module.rpartition(".")
        return f"text_encoder.{head}.{early[layer] if spelling == 'to_q_lora' else layer}"

    endings = {
        "lora_A": (".lora_A.weight", ".lora_B.weight"),
        "to_q_lora": ("_lora.down.weight", "_lora.up.weight"),
        "lora_linear_layer": (
            ".lora_linear_layer.down.weight",
            ".lora_linear_layer.up.weight",
        ),
    }[spelling]
    tensors |= written(clip, name, *endings)
    folder = tmp_path / "adapter"
    save(folder / "pytorch_lora_weights.safetensors", tensors)
    assert formats(folder) == ("adapter", "diffusers")
    base = pipeline(tmp_path / "base", unet=UNET, text_encoder=CLIP)
    found = merge(base, folder, tmp_path / "out")
    expected = {f"unet.{k}": v for k, v in sums(UNET, deltas_of(unet)).items()}
    expected |= {f"text_encoder.{k}": v for k, v in sums(CLIP, deltas_of(clip)).items()}
    assert_equal(found, expected)
    listing = lorafast.inspect(folder).to_dict()["adapter"]
    assert listing is not None
    assert listing["components"] == ["denoiser", "text_encoder"]


def config(**fields: Any) -> dict[str, str]:
    """diffusers' metadata of one component."""
    plain = {"r": 2, "lora_alpha": 2, "peft_type": "LORA", **fields}
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in plain.items()})}


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        (config(lora_alpha=3), 1.5),
        (config(lora_alpha=4, use_rslora=True), 4 / 2**0.5),
        (config(lora_alpha=8, alpha_pattern={"attn.to_q": 1.0, ".*": 3.0}), None),
        ({"lora_alpha": "5"}, 2.5),
        ({"network_alpha": "1.0"}, 0.5),
        ({"transformer.lora_alpha": "6"}, 3.0),
        ({"lora_alpha": "None"}, 1.0),
        ({"lora_alpha": "3"} | config(lora_alpha=3), 1.5),
    ],
)
def test_metadata_gives_the_scale(
    metadata: dict[str, str], scale: float | None, tmp_path: Path
) -> None:
    pairs = pairs_of(FLUX, FLUX_MODULES, 1.0 if scale is None else scale)
    if scale is None:
        for name, pair in pairs.items():
            pair.delta *= 0.5 if name.endswith("attn.to_q") else 1.5
    tensors = written(pairs, lambda name: f"transformer.{name}")
    adapter = save(tmp_path / "a.safetensors", tensors, metadata)
    check("flux1", FLUX, adapter, theirs("flux1", FLUX, deltas_of(pairs)), tmp_path)


@pytest.mark.parametrize(
    ("metadata", "alpha", "message"),
    [
        (
            config(lora_alpha=3),
            4.0,
            r"alpha is 4, but its metadata \(lora_adapter_metadata\) makes it 3",
        ),
        ({"lora_alpha": "3"}, 4.0, r"alpha is 4, but its metadata \(lora_alpha\) makes it 3"),
        ({"lora_alpha": "3"} | config(lora_alpha=4), None, "its metadata has two scales"),
        ({"lora_alpha": "x"}, None, 'sets lora_alpha to "x"; an alpha is a finite number'),
        ({"lora_alpha": "0"}, None, "an alpha is a finite number other than 0"),
        (config(r=8), None, "has rank 8 for .*, whose factors have 2"),
        ({"lora_adapter_metadata": "{"}, None, "lora_adapter_metadata is no JSON object"),
        (config(use_qalora=True), None, "use_qalora"),
        (config(new_field=1), None, "new_field"),
    ],
)
def test_metadata_that_cannot_be_followed_is_an_error(
    metadata: dict[str, str], alpha: float | None, message: str, tmp_path: Path
) -> None:
    pairs = pairs_of(FLUX, FLUX_MODULES)
    tensors = written(pairs, lambda name: f"transformer.{name}", alpha=alpha)
    adapter = save(tmp_path / "a.safetensors", tensors, metadata)
    base = save(tmp_path / "base.safetensors", FLUX)
    with pytest.raises(lorafast.LorafastError, match=message):
        lorafast.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_alphas_beside_the_metadata_may_say_the_same(tmp_path: Path) -> None:
    pairs = pairs_of(FLUX, FLUX_MODULES, 1.5)
    tensors = written(pairs, lambda name: f"transformer.{name}", alpha=3.0)
    adapter = save(tmp_path / "a.safetensors", tensors, config(lora_alpha=3))
    check("flux1", FLUX, adapter, theirs("flux1", FLUX, deltas_of(pairs)), tmp_path)


# ComfyUI, LyCORIS, OneTrainer


def original(modules: list[str]) -> tuple[Tensors, dict[str, Pair]]:
    """The toy Flux in its author's names, and factors of some of its modules there."""
    weights = toys.in_the_authors_names("flux1", FLUX)
    return weights, pairs_of(weights, modules)


FUSED = [
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.txt_attn.proj",
    "double_blocks.0.img_mlp.0",
    "single_blocks.0.linear1",
    "single_blocks.0.linear2",
    "final_layer.adaLN_modulation.1",
    "img_in",
]


@pytest.mark.parametrize(
    "prefix", ["diffusion_model.", "model.diffusion_model.", "base_model.model."]
)
@pytest.mark.parametrize("spelling", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
@pytest.mark.parametrize("alpha", [None, 4.0])
def test_the_authors_names_behind_a_prefix(
    prefix: str, spelling: tuple[str, str], alpha: float | None, tmp_path: Path
) -> None:
    weights, pairs = original(FUSED)
    for pair in pairs.values():
        pair.delta *= 1 if alpha is None else alpha / 2
    endings = (f".{part}.weight" for part in spelling)
    tensors = written(pairs, lambda name: prefix + name, *endings, alpha=alpha)
    adapter = save(tmp_path / "a.safetensors", tensors)
    is_peft = prefix.startswith("base_model")
    expected = "comfyui" if not is_peft else "onetrainer" if alpha else "bfl"
    assert formats(adapter) == ("adapter", expected)
    check("flux1", FLUX, adapter, sums(weights, deltas_of(pairs)), tmp_path)


def test_comfyui_names_text_encoders(tmp_path: Path) -> None:
    pairs = pairs_of(CLIP, CLIP_MODULES)
    unet = pairs_of(UNET, UNET_MODULES[:1])
    original_name = toys.in_the_authors_names("sd1", {f"{UNET_MODULES[0]}.weight": np.zeros(1)})
    (flat,) = original_name
    tensors = written(pairs, lambda name: f"text_encoders.clip_l.transformer.{name}")
    tensors |= written(unet, lambda _: f"diffusion_model.{flat.removesuffix('.weight')}")
    adapter = save(tmp_path / "a.safetensors", tensors)
    assert formats(adapter) == ("adapter", "comfyui")
    base = pipeline(tmp_path / "base", unet=UNET, text_encoder=CLIP)
    expected = {f"unet.{k}": v for k, v in sums(UNET, deltas_of(unet)).items()}
    expected |= {f"text_encoder.{k}": v for k, v in sums(CLIP, deltas_of(pairs)).items()}
    assert_equal(merge(base, adapter, tmp_path / "out"), expected)


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_transformer_"])
def test_flattened_names_of_diffusers(prefix: str, tmp_path: Path) -> None:
    pairs = pairs_of(FLUX, FLUX_MODULES, 2.0)
    tensors = written(
        pairs,
        lambda name: prefix + name.replace(".", "_"),
        ".lora_down.weight",
        ".lora_up.weight",
        alpha=4.0,
    )
    adapter = save(tmp_path / "a.safetensors", tensors)
    assert formats(adapter)[1] == {"lycoris_": "lycoris"}.get(prefix, "onetrainer")
    check("flux1", FLUX, adapter, theirs("flux1", FLUX, deltas_of(pairs)), tmp_path)


def test_onetrainer_numbers_the_parts_of_fused_layers(tmp_path: Path) -> None:
    pairs = pairs_of(FLUX, FLUX_MODULES, 0.5)
    numbered = {
        f"{DOUBLE}.attn.to_q": "double_blocks.0.img_attn.qkv.0",
        f"{DOUBLE}.attn.to_k": "double_blocks.0.img_attn.qkv.1",
        f"{DOUBLE}.attn.to_v": "double_blocks.0.img_attn.qkv.2",
        f"{DOUBLE}.attn.add_k_proj": "double_blocks.0.txt_attn.qkv.1",
        f"{DOUBLE}.attn.to_out.0": "double_blocks.0.img_attn.proj",
        f"{DOUBLE}.ff.net.2": "double_blocks.0.img_mlp.2",
        f"{SINGLE}.attn.to_v": "single_blocks.0.linear1.2",
        f"{SINGLE}.proj_mlp": "single_blocks.0.linear1.3",
    }
    tensors = written(
        pairs,
        lambda name: f"transformer.{numbered[name]}",
        ".lora_down.weight",
        ".lora_up.weight",
        alpha=1.0,
    )
    metadata = {"ot_branch": "omi_format", "modelspec.sai_model_spec": "1.0.0"}
    adapter = save(tmp_path / "a.safetensors", tensors, metadata)
    assert formats(adapter) == ("adapter", "onetrainer")
    assert lorafast.inspect(adapter).to_dict()["adapter"]["trainer"] == "OneTrainer"  # type: ignore[index]
    check("flux1", FLUX, adapter, theirs("flux1", FLUX, deltas_of(pairs)), tmp_path)


def test_onetrainer_writes_the_authors_names_without_a_prefix(tmp_path: Path) -> None:
    weights, pairs = original(FUSED)
    for pair in pairs.values():
        pair.delta *= 0.5
    adapter = save(tmp_path / "a.safetensors", written(pairs, str, alpha=1.0))
    assert formats(adapter) == ("adapter", "onetrainer")
    check("flux1", FLUX, adapter, sums(weights, deltas_of(pairs)), tmp_path)


# XLabs, Black Forest Labs


def test_xlabs_processors_are_layers_of_two_streams(tmp_path: Path) -> None:
    weights = toys.in_the_authors_names("flux1", FLUX)
    named = {
        "double_blocks.0.processor.qkv_lora1": "double_blocks.0.img_attn.qkv",
        "double_blocks.0.processor.proj_lora1": "double_blocks.0.img_attn.proj",
        "double_blocks.0.processor.qkv_lora2": "double_blocks.0.txt_attn.qkv",
        "double_blocks.0.processor.proj_lora2": "double_blocks.0.txt_attn.proj",
        "single_blocks.0.processor.proj_lora": "single_blocks.0.linear2",
        "single_blocks.0.processor.qkv_lora": "single_blocks.0.linear1",
    }
    tensors: Tensors = {}
    deltas: Tensors = {}
    for seed, (key, module) in enumerate(named.items()):
        weight = weights[f"{module}.weight"]
        # Of a single block's first layer the rows of q, k and v alone.
        rows = 3 * toys.WIDTH if module.endswith("linear1") else len(weight)
        pair = Pair(weight[:rows], seed)
        tensors |= {f"{key}.down.weight": pair.down, f"{key}.up.weight": pair.up}
        deltas[f"{module}.weight"] = np.zeros(weight.shape)
        deltas[f"{module}.weight"][:rows] = pair.delta
    adapter = save(tmp_path / "a.safetensors", tensors)
    assert formats(adapter) == ("adapter", "xlabs")
    check("flux1", FLUX, adapter, sums(weights, deltas), tmp_path)


def test_bfl_brings_biases_and_norms(tmp_path: Path) -> None:
    weights, pairs = original([*FUSED[:2], "final_layer.linear"])
    tensors = written(pairs, str)
    deltas = deltas_of(pairs)
    random = np.random.default_rng(9)
    for name in pairs:
        bias = random.normal(size=weights[f"{name}.bias"].shape).astype(np.float32)
        tensors[f"{name}.lora_B.bias"] = bias
        deltas[f"{name}.bias"] = bias
    expected = sums(weights, deltas)
    norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    tensors[norm] = expected[norm] = random.normal(size=3).astype(np.float32)
    adapter = save(tmp_path / "a.safetensors", tensors)
    assert formats(adapter) == ("adapter", "bfl")
    check("flux1", FLUX, adapter, expected, tmp_path)


def test_a_wider_layer_than_the_base_s_is_refused_by_name(tmp_path: Path) -> None:
    weights, pairs = original(FUSED[:2])
    wide = Pair(np.zeros((toys.WIDTH, 2 * toys.IMAGE), np.float32), 1)
    tensors = written(pairs, str) | written({"img_in": wide}, str)
    tensors["img_in.lora_B.bias"] = np.zeros(toys.WIDTH, np.float32)
    adapter = save(tmp_path / "a.safetensors", tensors)
    base = save(tmp_path / "base.safetensors", weights)
    with pytest.raises(lorafast.PlanError, match="img_in"):
        lorafast.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# cloneofsimo


def layers_in_order(weights: Tensors, order: tuple[str, ...]) -> list[str]:
    """The layers of a UNet as diffusers registers them: the middle comes last."""
    blocks = sorted(
        {name.split(".attn1.")[0] for name in weights if ".attn1." in name},
        key=lambda name: (["down", "up_b", "mid_"].index(name[:4]), name),
    )
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    layers = []
    for block in blocks:
        for part in order:
            names = ["net.0.proj"] if part == "ff" else attention
            layers += [f"{block}.{part}.{name}" for name in names]
    return layers


@pytest.mark.parametrize(
    "order", [("attn1", "ff", "attn2"), ("attn1", "attn2", "ff"), ("attn1", "attn2")]
)
def test_cloneofsimo_counts_layers(order: tuple[str, ...], tmp_path: Path) -> None:
    unet = pairs_of(UNET, layers_in_order(UNET, order))
    layers = [
        f"text_model.encoder.layers.{layer}.self_attn.{name}_proj"
        for layer in range(2)
        for name in ("k", "v", "q", "out")
    ]
    clip = pairs_of(CLIP, layers)
    tensors: Tensors = {"<s1>": np.ones(6, np.float32)}
    for component, pairs in (("unet", unet), ("text_encoder", clip)):
        for number, pair in enumerate(pairs.values()):
            tensors[f"{component}:{number}:up"] = pair.up
            tensors[f"{component}:{number}:down"] = pair.down
    metadata = {"unet": '["CrossAttention", "Attention", "GEGLU"]', "<s1>": "<embed>"}
    adapter = save(tmp_path / "a.safetensors", tensors, metadata)
    assert formats(adapter) == ("adapter", "cloneofsimo")
    base = pipeline(tmp_path / "base", unet=UNET, text_encoder=CLIP)
    with pytest.raises(lorafast.AdapterError, match="embeddings of a textual inversion"):
        lorafast.merge(base, adapter, tmp_path / "out")
    expected = {f"unet.{k}": v for k, v in sums(UNET, deltas_of(unet)).items()}
    expected |= {f"text_encoder.{k}": v for k, v in sums(CLIP, deltas_of(clip)).items()}
    assert_equal(merge(base, adapter, tmp_path / "out", allow="bundle_emb"), expected)
    single = {
        f"model.diffusion_model.{k}": v for k, v in toys.in_the_authors_names("sd1", UNET).items()
    }
    single |= {f"cond_stage_model.transformer.{k}": v for k, v in CLIP.items()}
    found = merge(
        save(tmp_path / "single.safetensors", single), adapter, tmp_path / "o", allow="bundle_emb"
    )
    prefix = "model.diffusion_model."
    expected = dict(toys.in_the_authors_names("sd1", sums(UNET, deltas_of(unet))).items())
    assert_equal(
        {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}, expected
    )


def test_a_list_of_pairs_is_cloneofsimo_s(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pairs = pairs_of(UNET, layers_in_order(UNET, ("attn1", "attn2")))
    listed = [torch.from_numpy(each) for pair in pairs.values() for each in (pair.up, pair.down)]
    torch.save(listed, tmp_path / "lora.pt")
    assert formats(tmp_path / "lora.pt") == ("adapter", "cloneofsimo")
    check("sd1", UNET, tmp_path / "lora.pt", theirs("sd1", UNET, deltas_of(pairs)), tmp_path)


def test_layers_that_cannot_be_counted_are_refused(tmp_path: Path) -> None:
    pairs = pairs_of(UNET, layers_in_order(UNET, ("attn1", "attn2"))[1:])
    tensors = {}
    for number, pair in enumerate(pairs.values()):
        tensors |= {f"unet:{number}:up": pair.up, f"unet:{number}:down": pair.down}
    adapter = save(tmp_path / "a.safetensors", tensors)
    base = save(tmp_path / "base.safetensors", UNET)
    with pytest.raises(lorafast.AdapterError, match="cloneofsimo's format"):
        lorafast.merge(base, adapter, tmp_path / "out")
