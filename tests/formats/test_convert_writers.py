"""Converting into the formats of lone files: LyCORIS, OneTrainer, XLabs, Black Forest Labs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from support import image_formats as toys
from support.conversions import kohya_file, merged, scene
from support.image_formats import Pair, Tensors, save

DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
#: Layers that XLabs' trainer has names for, in diffusers' names.
ATTENTION = [
    *(f"{DOUBLE}.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
    *(f"{DOUBLE}.attn.add_{name}_proj" for name in "qkv"),
    *(f"{SINGLE}.attn.{name}" for name in ("to_q", "to_k", "to_v")),
    f"{SINGLE}.proj_out",
]


def convert(source: Path, target: Path, to: Any, **options: Any) -> lorafast.ConversionReport:
    return lorafast.convert(source, target, to=to, **options)


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "np") as opened:
        return dict(opened.metadata())


def format_of(file: Path) -> Any:
    listing = lorafast.inspect(file).to_dict()
    assert listing["kind"] == "adapter"
    return listing["format"]


def flux_file(root: Path) -> Path:
    """The toy Flux as its authors save it."""
    weights = toys.in_the_authors_names("flux1", toys.flux())
    return save(root / "flux.safetensors", weights)


def flux_adapter(
    path: Path, modules: list[str], *, scale: float = 1.0, shared: bool = False
) -> Path:
    """A file of diffusers' for some layers of the toy Flux; q, k and v may share their A."""
    weights, tensors = toys.flux(), {}
    for seed, name in enumerate(modules):
        pair = Pair(weights[f"{name}.weight"], seed)
        down = Pair(weights[f"{name}.weight"], 0).down if shared else pair.down
        tensors[f"transformer.{name}.lora_A.weight"] = down
        tensors[f"transformer.{name}.lora_B.weight"] = np.float32(scale) * pair.up
    return save(path, tensors)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("alpha", [2.0, 1.5])
@pytest.mark.parametrize("to", ["lycoris", "onetrainer"])
@pytest.mark.parametrize("kind", ["flux file", "flux folder", "sd1", "sdxl"])
def test_flattened_names_there_and_back(
    kind: str, to: str, alpha: float, dora: bool, tmp_path: Path
) -> None:
    base, file = scene(tmp_path, kind, alpha, dora=dora)
    output = tmp_path / "out.safetensors"
    report = convert(file, output, to, base=base)
    assert (report.source_format, report.target_format, report.lost) == ("kohya", to, ())
    # Sums over cut and joined factors are in another order, and so in the report.
    assert report.max_error is not None
    assert report.max_error < 1e-14
    assert format_of(output) == to
    expected = toys.merge(base, file, tmp_path / "expected")
    toys.assert_equal(toys.merge(base, output, tmp_path / "found"), expected)
    back = convert(output, tmp_path / "back.safetensors", "kohya", base=base)
    assert back.max_error is not None
    assert back.max_error < 1e-14
    tensors, again = load_file(file), load_file(tmp_path / "back.safetensors")
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    convert(output, tmp_path / "peft", "peft", base=base)
    found = merged(base, tmp_path / "peft", tmp_path / "found_peft")
    toys.assert_equal(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("to", ["lycoris", "onetrainer"])
def test_names_are_those_of_each_program(to: str, tmp_path: Path) -> None:
    base, file = scene(tmp_path, "sdxl", 1.0, dora=False)
    convert(file, tmp_path / "out.safetensors", to, base=base)
    keys = set(load_file(tmp_path / "out.safetensors"))
    unet = {"lycoris": "lycoris_", "onetrainer": "lora_unet_"}[to]
    block = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    assert f"{unet}{block}.lora_down.weight" in keys
    for number in (1, 2):
        layer = f"lora_te{number}_text_model_encoder_layers_1_self_attn_q_proj"
        assert {f"{layer}.lora_up.weight", f"{layer}.alpha"} <= keys
    base = flux_file(tmp_path)
    adapter = flux_adapter(tmp_path / "flux_lora.safetensors", ATTENTION)
    convert(adapter, tmp_path / "y.safetensors", to, base=base)
    transformer = {"lycoris": "lycoris_", "onetrainer": "lora_transformer_"}[to]
    keys = set(load_file(tmp_path / "y.safetensors"))
    assert f"{transformer}transformer_blocks_0_attn_add_q_proj.lora_down.weight" in keys


def test_one_text_encoder_alone_is_what_lycoris_wrapped(tmp_path: Path) -> None:
    base = toys.pipeline(tmp_path / "base", unet=toys.unet(), text_encoder=toys.clip())
    file = kohya_file(tmp_path / "x.safetensors", {"lora_te_": toys.clip()}, 1.0, dora=False)
    report = convert(file, tmp_path / "y.safetensors", "lycoris", base=base)
    assert report.max_error == 0.0
    assert format_of(tmp_path / "y.safetensors") == "lycoris"
    keys = load_file(tmp_path / "y.safetensors")
    assert all(name.startswith("lycoris_text_model_encoder_layers_") for name in keys)
    # OneTrainer's is known by what its metadata says.
    convert(file, tmp_path / "z.safetensors", "onetrainer", base=base)
    assert format_of(tmp_path / "z.safetensors") == "onetrainer"
    assert lorafast.inspect(tmp_path / "z.safetensors").to_dict()["adapter"]["trainer"] != (  # type: ignore[index]
        "OneTrainer"
    )


def hadamard(weight: Any, seed: int, *, tucker: bool) -> Tensors:
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return random.normal(size=shape).astype(np.float32)

    rows, columns, *kernel = weight.shape
    if tucker:
        sides = {f"hada_t{n}": normal(1, 1, *kernel) for n in (1, 2)}
        sides |= {f"hada_w{n}_a": normal(1, rows) for n in (1, 2)}
        return sides | {f"hada_w{n}_b": normal(1, columns) for n in (1, 2)}
    inputs = int(np.prod([columns, *kernel]))
    sides = {f"hada_w{n}_a": normal(rows, 1) for n in (1, 2)}
    return sides | {f"hada_w{n}_b": normal(1, inputs) for n in (1, 2)}


def kronecker(weight: Any, seed: int) -> Tensors:
    random = np.random.default_rng(seed)
    rows, columns = weight.shape
    return {
        "lokr_w1": random.normal(size=(2, 2)).astype(np.float32),
        "lokr_w2_a": random.normal(size=(rows // 2, 1)).astype(np.float32),
        "lokr_w2_b": random.normal(size=(1, columns // 2)).astype(np.float32),
    }


def of_lycoris(root: Path, *, tucker: bool = False, vectors: bool = False) -> tuple[Path, Path]:
    """A UNet, and a file of kohya's with LoHa in a convolution and LoKr in linear layers."""
    weights = toys.unet()
    weights["conv_norm_out.weight"] = np.ones(4, np.float32)
    weights["conv_norm_out.bias"] = np.ones(4, np.float32)
    base = toys.pipeline(root / "base", unet=weights)
    parts = {"mid_block_resnets_0_conv1": hadamard(np.zeros((4, 4, 3, 3)), 1, tucker=tucker)}
    block = "mid_block_attentions_0_transformer_blocks_0_attn2"
    for seed, name in enumerate(("to_q", "to_k")):
        weight = weights[f"mid_block.attentions.0.transformer_blocks.0.attn2.{name}.weight"]
        parts[f"{block}_{name}"] = kronecker(weight, seed)
    tensors = {}
    for module, own in parts.items():
        tensors |= {f"lora_unet_{module}.{part}": value for part, value in own.items()}
        tensors[f"lora_unet_{module}.alpha"] = np.array(1.5, np.float32)
    if vectors:
        random = np.random.default_rng(4)
        for part in ("w_norm", "b_norm"):
            values = random.normal(size=4).astype(np.float32)
            tensors[f"lora_unet_conv_norm_out.{part}"] = values
    return base, save(root / "x.safetensors", tensors, {"ss_network_args": '{"algo": "loha"}'})


@pytest.mark.parametrize("to", ["lycoris", "onetrainer"])
def test_loha_and_lokr_are_kept(to: str, tmp_path: Path) -> None:
    base, file = of_lycoris(tmp_path, vectors=to == "lycoris", tucker=to == "lycoris")
    report = convert(file, tmp_path / "y.safetensors", to, base=base)
    assert (report.max_error, report.lost) == (0.0, ())
    prefix = {"lycoris": "lycoris_", "onetrainer": "lora_unet_"}[to]
    expected, found = load_file(file), load_file(tmp_path / "y.safetensors")
    renamed = {name.replace("lora_unet_", prefix): value for name, value in expected.items()}
    assert found.keys() == renamed.keys()
    for name, value in renamed.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    # The algorithm is kohya's word still.
    assert metadata_of(tmp_path / "y.safetensors")["ss_network_args"] == '{"algo": "loha"}'
    again = toys.merge(base, tmp_path / "y.safetensors", tmp_path / "b")
    toys.assert_equal(again, toys.merge(base, file, tmp_path / "a"))
    plain = convert(file, tmp_path / "p.safetensors", to, base=base, algorithm="lora")
    assert plain.max_error is not None
    assert plain.max_error < 1e-6
    assert plain.lost == ()
    endings = {name.split(".", 1)[1] for name in load_file(tmp_path / "p.safetensors")}
    assert endings - {"w_norm", "b_norm"} == {"lora_down.weight", "lora_up.weight", "alpha"}


def test_onetrainer_has_no_tucker_and_no_norms(tmp_path: Path) -> None:
    base, file = of_lycoris(tmp_path, tucker=True, vectors=True)
    with pytest.raises(lorafast.UnsupportedAdapterError, match=r"norms .*conv_norm_out"):
        convert(file, tmp_path / "y.safetensors", "onetrainer", base=base)
    assert not (tmp_path / "y.safetensors").exists()
    report = convert(file, tmp_path / "y.safetensors", "onetrainer", base=base, lossy=True)
    assert report.max_error is not None
    assert report.max_error < 1e-6
    assert "norms" in report.lost[0]
    endings = {name.split(".", 1)[1] for name in load_file(tmp_path / "y.safetensors")}
    assert not any(ending.startswith("hada_") for ending in endings)
    assert {"lora_down.weight", "lokr_w1", "alpha"} <= endings


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.75])
@pytest.mark.parametrize("kind", ["flux file", "flux folder"])
def test_bfl_there_and_back(kind: str, scale: float, tmp_path: Path) -> None:
    base, file = scene(tmp_path, kind, 2 * scale, dora=False)
    output = tmp_path / "y.safetensors"
    report = convert(file, output, "bfl", base=base)
    assert report.max_error is not None
    assert report.max_error < (1e-7 if scale == 0.75 else 1e-14)
    assert format_of(output) == "bfl"
    written = load_file(output)
    own = load_file(file)
    module = "double_blocks.0.img_attn.qkv"
    flat = "lora_unet_" + module.replace(".", "_")
    np.testing.assert_array_equal(
        written[f"{module}.lora_A.weight"], own[f"{flat}.lora_down.weight"]
    )
    folded = np.float32(scale) * own[f"{flat}.lora_up.weight"]
    np.testing.assert_array_equal(written[f"{module}.lora_B.weight"], folded)
    assert not any(name.endswith(".alpha") for name in written)
    assert "lora_adapter_metadata" not in metadata_of(output)
    expected = toys.merge(base, file, tmp_path / "expected")
    toys.assert_equal(toys.merge(base, output, tmp_path / "found"), expected)
    back = convert(output, tmp_path / "back.safetensors", "kohya", base=base)
    assert back.max_error == 0.0
    again = load_file(tmp_path / "back.safetensors")
    assert again.keys() == own.keys()
    for name, value in own.items():
        if not name.endswith(".alpha"):
            factor = np.float32(scale if "up" in name else 1)
            np.testing.assert_array_equal(again[name], factor * value, err_msg=name)


def test_bfl_keeps_biases_and_its_own_norms(tmp_path: Path) -> None:
    base = flux_file(tmp_path)
    random = np.random.default_rng(1)
    module, norm = "double_blocks.0.img_attn.proj", "double_blocks.0.img_attn.norm.query_norm.scale"
    pair = Pair(np.zeros((toys.WIDTH, toys.WIDTH)), 1)
    tensors = {
        f"{module}.lora_A.weight": pair.down,
        f"{module}.lora_B.weight": pair.up,
        f"{module}.lora_B.bias": random.normal(size=toys.WIDTH).astype(np.float32),
    }
    diffusers = save(
        tmp_path / "d.safetensors", {f"transformer.{k}": v for k, v in tensors.items()}
    )
    report = convert(diffusers, tmp_path / "x.safetensors", "bfl", base=base)
    assert report.max_error == 0.0
    assert load_file(tmp_path / "x.safetensors").keys() == tensors.keys()
    tensors[norm] = random.normal(size=3).astype(np.float32)
    own = save(tmp_path / "own.safetensors", tensors)
    report = convert(own, tmp_path / "again.safetensors", "bfl", dtype="float64")
    assert report.max_error is not None
    assert report.max_error < 1e-14
    assert report.lost == ()
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys()
    np.testing.assert_array_equal(again[norm], tensors[norm].astype(np.float64))


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared A"])
@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("layout", ["file", "folder"])
def test_xlabs_there_and_back(layout: str, form: str, shared: bool, tmp_path: Path) -> None:
    if layout == "file":
        base = flux_file(tmp_path)
    else:
        base = toys.pipeline(tmp_path / "base", transformer=toys.flux())
    file = flux_adapter(tmp_path / "d.safetensors", ATTENTION, shared=shared)
    source = file
    if form != "diffusers":
        source = tmp_path / ("p" if form == "peft" else "k.safetensors")
        convert(file, source, form, base=base)
    output = tmp_path / "x.safetensors"
    report = convert(source, output, "xlabs", base=base)
    assert report.max_error is not None
    assert report.max_error < 1e-14
    assert report.lost == ()
    assert format_of(output) == "xlabs"
    keys = set(load_file(output))
    layers = ["double_blocks.0.processor.qkv_lora1", "double_blocks.0.processor.proj_lora1"]
    layers += ["double_blocks.0.processor.qkv_lora2", "double_blocks.0.processor.proj_lora2"]
    layers += ["single_blocks.0.processor.qkv_lora", "single_blocks.0.processor.proj_lora"]
    assert keys == {f"{layer}.{side}.weight" for layer in layers for side in ("down", "up")}
    expected = toys.merge(base, file, tmp_path / "expected")
    toys.assert_equal(toys.merge(base, output, tmp_path / "found"), expected)
    back = convert(output, tmp_path / "back.safetensors", "diffusers", base=base)
    assert back.max_error is not None
    assert back.max_error < 1e-14
    # kohya's file has rows of the MLP, which was not trained, and so other factors.
    if shared and form != "kohya":
        again = load_file(tmp_path / "back.safetensors")
        for name, value in load_file(file).items():
            np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_xlabs_has_no_names_for_the_rest(tmp_path: Path) -> None:
    base, file = scene(tmp_path, "flux file", 2.0, dora=False)
    with pytest.raises(lorafast.UnsupportedAdapterError, match="no names for") as caught:
        convert(file, tmp_path / "out.safetensors", "xlabs", base=base)
    assert "double_blocks.0.img_mlp.0" in str(caught.value)
    report = convert(file, tmp_path / "out.safetensors", "xlabs", base=base, lossy=True)
    (lost,) = report.lost
    assert "no names for" in lost
    assert report.modules == 6
    assert report.max_error is not None
    assert report.max_error < 1e-14
    # Of the fused layer the rows of q, k and v alone are there.
    flat = "lora_unet_single_blocks_0_linear1.lora_up.weight"
    up = load_file(tmp_path / "out.safetensors")["single_blocks.0.processor.qkv_lora.up.weight"]
    np.testing.assert_array_equal(up, load_file(file)[flat][: 3 * toys.WIDTH])
    # An MLP that was left as it is, is no loss.
    weights = toys.in_the_authors_names("flux1", toys.flux())
    linear1 = {"single_blocks.0.linear1.weight": weights["single_blocks.0.linear1.weight"]}
    one = kohya_file(tmp_path / "one.safetensors", {"lora_unet_": linear1}, 2.0, dora=False)
    with pytest.raises(lorafast.UnsupportedAdapterError, match=r"rows of the MLP in .*linear1"):
        convert(one, tmp_path / "z.safetensors", "xlabs", base=base)
    tensors = load_file(one)
    tensors[flat][3 * toys.WIDTH :] = 0
    save(one, tensors)
    report = convert(one, tmp_path / "z.safetensors", "xlabs", base=base)
    assert report.max_error is not None
    assert report.max_error < 1e-14
    assert report.lost == ()


@pytest.mark.parametrize("to", ["xlabs", "bfl"])
def test_formats_of_flux_alone_refuse_the_rest(to: str, tmp_path: Path) -> None:
    base, file = scene(tmp_path, "sdxl", 2.0, dora=False)
    with pytest.raises(lorafast.UnsupportedAdapterError, match="no block in the names of Flux"):
        convert(file, tmp_path / "y.safetensors", to, base=base, lossy=True)
    flux = toys.pipeline(tmp_path / "flux", transformer=toys.flux(), text_encoder=toys.clip())
    adapter = flux_adapter(tmp_path / "d.safetensors", ATTENTION)
    tensors = load_file(adapter)
    pair = Pair(np.zeros((6, 6)), 1)
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors |= {f"{layer}.lora_A.weight": pair.down, f"{layer}.lora_B.weight": pair.up}
    save(adapter, tensors)
    with pytest.raises(lorafast.UnsupportedAdapterError, match=r"text encoders \(.*q_proj"):
        convert(adapter, tmp_path / "y.safetensors", to, base=flux)
    report = convert(adapter, tmp_path / "y.safetensors", to, base=flux, lossy=True)
    assert len(report.lost) == 1
    assert report.modules == 6
    dora = kohya_file(
        tmp_path / "dora.safetensors",
        {"lora_unet_": {k: v for k, v in toys.flux().items() if k.endswith("to_k.weight")}},
        2.0,
        dora=True,
    )
    with pytest.raises(lorafast.UnsupportedAdapterError, match="DoRA's magnitudes"):
        convert(dora, tmp_path / "z.safetensors", to, base=flux)
    assert not (tmp_path / "z.safetensors").exists()


def test_what_only_a_base_tells(tmp_path: Path) -> None:
    base, file = scene(tmp_path, "flux file", 2.0, dora=False)
    for to in ("lycoris", "onetrainer", "xlabs", "bfl"):
        with pytest.raises(lorafast.UnsupportedAdapterError, match="give the base"):
            convert(file, tmp_path / f"{to}.safetensors", to)
        if to != "xlabs":
            convert(file, tmp_path / f"{to}.safetensors", to, base=base)
    for to in ("lycoris", "onetrainer"):
        # Its own names are kept, and are no kohya's.
        own = tmp_path / f"{to}.safetensors"
        report = convert(own, tmp_path / "half.safetensors", to, dtype="float16", overwrite=True)
        assert report.max_error is not None
        assert 0 < report.max_error < 1e-3
        with pytest.raises(lorafast.UnsupportedAdapterError, match="give the base"):
            convert(own, tmp_path / "k.safetensors", "kohya")
    comfy = tmp_path / "comfy.safetensors"
    convert(file, comfy, "comfyui", base=base)
    report = convert(comfy, tmp_path / "direct.safetensors", "bfl")
    assert report.max_error == 0.0
    with pytest.raises(lorafast.UnsupportedAdapterError, match="linear1"):
        convert(comfy, tmp_path / "out.safetensors", "xlabs", lossy=True)


def test_numbered_layers_are_not_written(tmp_path: Path) -> None:
    _, file = scene(tmp_path, "sd1", 2.0, dora=False)
    with pytest.raises(ValueError, match="release of diffusers"):
        convert(file, tmp_path / "y.safetensors", "cloneofsimo")


# OneTrainer's own files


def test_onetrainers_files_become_others(tmp_path: Path) -> None:
    base, file = scene(tmp_path, "sd1", 1.0, dora=False)
    theirs = tmp_path / "ot.safetensors"
    told = {"ot_branch": "master", "ot_revision": "1", "modelspec.title": "mine"}
    save(theirs, load_file(file), told)
    assert format_of(theirs) == "onetrainer"
    for to in ("kohya", "comfyui", "diffusers", "lycoris"):
        output = tmp_path / f"{to}.safetensors"
        report = convert(theirs, output, to, base=base)
        assert format_of(output) == to
        assert any("ot_branch" in lost for lost in report.lost)
        metadata = metadata_of(output)
        assert metadata["modelspec.title"] == "mine"
        assert not any(key.startswith("ot_") for key in metadata)
    convert(theirs, tmp_path / "again.safetensors", "onetrainer", base=base)
    assert metadata_of(tmp_path / "again.safetensors")["ot_revision"] == "1"


def test_onetrainers_numbered_parts_need_the_base(tmp_path: Path) -> None:
    base = flux_file(tmp_path)
    pair = Pair(np.zeros((toys.WIDTH, toys.WIDTH)), 1)
    module = "transformer.double_blocks.0.img_attn.qkv.1"
    tensors = {f"{module}.lora_down.weight": pair.down, f"{module}.lora_up.weight": pair.up}
    file = save(tmp_path / "omi.safetensors", tensors, {"ot_branch": "omi_format"})
    for to in ("comfyui", "kohya", "bfl", "onetrainer"):
        with pytest.raises(lorafast.UnsupportedAdapterError, match="give the base"):
            convert(file, tmp_path / "y.safetensors", to)
    report = convert(file, tmp_path / "y.safetensors", "onetrainer", base=base)
    assert report.max_error == 0.0
    (name, *_) = load_file(tmp_path / "y.safetensors")
    assert name.startswith("lora_transformer_transformer_blocks_0_attn_to_k.")
    expected = toys.merge(base, file, tmp_path / "expected")
    toys.assert_equal(toys.merge(base, tmp_path / "y.safetensors", tmp_path / "f"), expected)


# Flattened names with PEFT's endings


@pytest.mark.parametrize("endings", [(".lora_A.weight", ".lora_B.weight"), (".lora_A", ".lora_B")])
@pytest.mark.parametrize("kind", ["sdxl", "text encoder", "flux file"])
def test_flattened_names_with_the_endings_of_peft(
    kind: str, endings: tuple[str, str], tmp_path: Path
) -> None:
    if kind == "text encoder":
        base = toys.pipeline(tmp_path / "base", unet=toys.unet(), text_encoder=toys.clip())
        file = kohya_file(tmp_path / "x.safetensors", {"lora_te_": toys.clip()}, 1.5, dora=False)
    else:
        base, file = scene(tmp_path, kind, 1.5, dora=True)
    theirs = {
        name.replace(".lora_down.weight", endings[0]).replace(".lora_up.weight", endings[1]): value
        for name, value in load_file(file).items()
    }
    other = save(tmp_path / "other.safetensors", theirs)
    assert format_of(other) == "kohya"
    found = toys.merge(base, other, tmp_path / "found")
    expected = toys.merge(base, file, tmp_path / "expected")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    report = convert(other, tmp_path / "y.safetensors", "kohya", base=base)
    assert report.max_error == 0.0
    assert load_file(tmp_path / "y.safetensors").keys() == load_file(file).keys()


@pytest.mark.parametrize("parts", [("w_norm", "b_norm"), ("diff", "diff_b")])
@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
def test_a_weight_and_a_bias_of_one_layer_are_two_parameters(
    prefix: str, parts: tuple[str, str], tmp_path: Path
) -> None:
    weights = toys.unet()
    name = "conv_norm_out" if parts[0] == "w_norm" else "conv_out"
    if parts[0] == "w_norm":
        weights[f"{name}.weight"] = np.ones(4, np.float32)
    weights[f"{name}.bias"] = np.ones(4, np.float32)
    base = toys.pipeline(tmp_path / "base", unet=weights)
    random = np.random.default_rng(1)
    deltas = {
        leaf: random.normal(size=weights[f"{name}.{leaf}"].shape).astype(np.float32)
        for leaf in ("weight", "bias")
    }
    tensors = {
        f"{prefix}{name}.{part}": deltas[leaf] for part, leaf in zip(parts, deltas, strict=True)
    }
    pair = Pair(weights["mid_block.resnets.0.conv1.weight"], 1)
    other = f"{prefix}mid_block_resnets_0_conv1"
    tensors |= {f"{other}.lora_down.weight": pair.down, f"{other}.lora_up.weight": pair.up}
    file = save(tmp_path / "x.safetensors", tensors)
    merged = toys.merge(base, file, tmp_path / "out")
    for leaf, delta in deltas.items():
        expected = weights[f"{name}.{leaf}"] + delta
        np.testing.assert_array_equal(merged[f"unet.{name}.{leaf}"], expected)
    for to in ("lycoris", "kohya", "comfyui"):
        report = convert(file, tmp_path / f"{to}.safetensors", to, base=base)
        assert report.max_error == 0.0
        toys.assert_equal(toys.merge(base, tmp_path / f"{to}.safetensors", tmp_path / to), merged)
