"""Bases in NVFP4, MXFP4 and integers as compressed-tensors and ModelOpt store them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import Tensor, narrow, read_checkpoint, snapshot, tensor
from support.handmade import PREFIX, adapter_tensors, make_adapter, make_base
from support.packed import PACKED, integers, nvfp4
from support.quantised import Float64, Scheme

# The second is encoded in several units, and taller than blocks that are held whole.
MERGED = {
    "model.layers.0.q_proj": (52, 160),
    "model.layers.0.up_proj": (600, 1088),
}
UNTOUCHED = {"model.layers.1.up_proj": (13, 64)}
SCALE = 8 / 4

schemes = pytest.mark.parametrize("scheme", PACKED, ids=lambda scheme: scheme.name)


def quantised_base(path: Path, scheme: Scheme, shards: int = 2, **config: Any) -> Path:
    random = np.random.default_rng(11)
    others: dict[str, Tensor] = {}
    for module, shape in (MERGED | UNTOUCHED).items():
        sizes = np.exp(random.normal(scale=0.5, size=(shape[0], 1)))
        weight = random.normal(scale=0.05, size=shape) * sizes
        others |= scheme.quantise(f"{module}.weight", weight)
    others["model.layers.0.q_proj.input_global_scale"] = tensor(np.array([0.5]))
    return make_base(
        path,
        modules={},
        dtype="BF16",
        shards=shards,
        config={"quantization_config": dict(scheme.config)} | config,
        others=others,
    )


def adapter(path: Path, seed: int = 1, scale: float = 0.15, **settings: Any) -> Path:
    tensors = adapter_tensors(MERGED, seed=seed, scale=scale)
    if settings.get("use_dora"):
        random = np.random.default_rng(seed)
        for module, (rows, _) in MERGED.items():
            name = f"{PREFIX}{module}.lora_magnitude_vector"
            tensors[name] = tensor(np.exp(random.normal(scale=0.2, size=rows)))
    return make_adapter(path, tensors, **settings)


def delta(path: Path, module: str) -> Float64:
    tensors = read_checkpoint(path / "adapter_model.safetensors")
    a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].float64() for side in "AB")
    product: Float64 = SCALE * b @ a
    return product


def dequantised(scheme: Scheme, tensors: Mapping[str, Tensor], module: str) -> Float64:
    return scheme.dequantise(tensors, f"{module}.weight", (MERGED | UNTOUCHED)[module])


def assert_quantised(scheme: Scheme, tensors: Mapping[str, Tensor], module: str, exact: Float64):
    """Scales are those of the exact weights, and each code is the nearest one for its scale."""
    codes, scales = scheme.load(tensors, f"{module}.weight", exact.shape)
    right = scheme.scales_for(exact)
    # Where rounding a scale is as near to either side, float32 may take the other.
    other = np.abs(scales - right) > 1e-5 * right
    assert other.mean() < 1e-3 if right.size > 1000 else not other.any()
    unit = scales[scheme.blocks(exact.shape)]
    stored = scheme.table[codes].reshape(exact.shape) * unit
    nearest = scheme.table[scheme.nearest(exact, scales)] * unit
    noise = 1e-6 * (np.abs(exact) + unit * scheme.largest * 1e-1)
    assert np.all(np.abs(stored - exact) <= np.abs(nearest - exact) + noise)


@schemes
def test_the_scheme_is_kept(scheme: Scheme, tmp_path: Path) -> None:
    base, lora = quantised_base(tmp_path / "base", scheme), adapter(tmp_path / "adapter")
    merged = tmp_path / "merged"
    report = lorafast.merge(base, lora, merged)
    before, after = read_checkpoint(base), read_checkpoint(merged)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert (value.dtype, value.shape) == (after[name].dtype, after[name].shape)
        kept = name.endswith(("global_scale", "scale_2", "_shape"))
        if not name.startswith(tuple(f"{module}." for module in MERGED)) or kept:
            assert value.data == after[name].data, name
    for module in MERGED:
        exact = dequantised(scheme, before, module) + delta(lora, module)
        assert_quantised(scheme, after, module, exact)
    assert (base / "config.json").read_bytes() == (merged / "config.json").read_bytes()
    assert report.tensors_merged == len(MERGED)
    for full in (False, True):
        outcome = lorafast.verify(base, lora, merged, full=full)
        assert outcome.ok, outcome.problems
        assert outcome.tensors_merged == len(MERGED)
    error = change = 0.0
    for module in MERGED:
        start, asked = dequantised(scheme, before, module), delta(lora, module)
        error += np.square(dequantised(scheme, after, module) - start - asked).sum()
        change += np.square(asked).sum()
    assert report.rounding is not None
    assert report.rounding["lost"] == pytest.approx(np.sqrt(error / change), rel=0.01)
    assert not lorafast.verify(base, lora, base).ok


@schemes
def test_written_out_and_taken_out_again(scheme: Scheme, tmp_path: Path) -> None:
    base, lora = quantised_base(tmp_path / "base", scheme), adapter(tmp_path / "adapter")
    merged = tmp_path / "merged"
    lorafast.merge(base, lora, merged, dtype="bfloat16", verify=True)
    before, after = read_checkpoint(base), read_checkpoint(merged)
    assert after.keys() == {f"{m}.weight" for m in MERGED | UNTOUCHED} | {"model.norm.weight"}
    for module, shape in (MERGED | UNTOUCHED).items():
        exact = dequantised(scheme, before, module)
        got = after[f"{module}.weight"]
        assert (got.dtype, got.shape) == ("BF16", shape)
        if module in UNTOUCHED:
            assert got.data == narrow(exact, "BF16")
            continue
        exact = exact + delta(lora, module)
        assert np.all(np.abs(got.float64() - exact) <= 2.0**-8 * np.abs(exact) + 1e-7)
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config
    assert lorafast.verify(base, lora, merged).ok
    # The base itself comes back, as it was or written out.
    lorafast.subtract(merged, lora, tmp_path / "base again", original=base)
    assert read_checkpoint(tmp_path / "base again") == before
    lorafast.subtract(merged, lora, tmp_path / "again", original=base, dtype="bfloat16")
    again = read_checkpoint(tmp_path / "again")
    for module in MERGED:
        expected = narrow(dequantised(scheme, before, module), "BF16")
        assert again[f"{module}.weight"].data == expected
    # From the sum alone, but for its rounding.
    lorafast.subtract(merged, lora, tmp_path / "alone", dtype="float32")
    alone = read_checkpoint(tmp_path / "alone")
    for module in MERGED:
        start, total = dequantised(scheme, before, module), after[f"{module}.weight"].float64()
        bound = 2.0**-8 * np.abs(total) + 1e-6
        assert np.all(np.abs(alone[f"{module}.weight"].float64() - start) <= bound)
    # From what is quantised nothing is subtracted but with the base.
    lorafast.merge(base, lora, tmp_path / "kept")
    with pytest.raises(lorafast.LorafastError, match="rounding is too coarse"):
        lorafast.subtract(tmp_path / "kept", lora, tmp_path / "never")
    lorafast.subtract(tmp_path / "kept", lora, tmp_path / "whole", original=base)
    assert read_checkpoint(tmp_path / "whole") == before


@schemes
def test_blocks_in_which_nothing_changes_keep_their_bytes(scheme: Scheme, tmp_path: Path) -> None:
    base = quantised_base(tmp_path / "base", scheme, shards=1)
    tensors = adapter_tensors(MERGED)
    for name, value in tensors.items():
        if "lora_B" in name:
            tensors[name] = tensor(np.zeros(value.shape))
    lorafast.merge(base, make_adapter(tmp_path / "adapter", tensors), tmp_path / "merged")
    file = "model.safetensors"
    assert (base / file).read_bytes() == (tmp_path / "merged" / file).read_bytes()


@schemes
def test_the_bytes_do_not_depend_on_threads(scheme: Scheme, tmp_path: Path) -> None:
    base, lora = quantised_base(tmp_path / "base", scheme), adapter(tmp_path / "adapter")
    for dtype in ("auto", "float16"):
        outputs = []
        for threads in (1, 3):
            output = tmp_path / f"{dtype}-{threads}"
            lorafast.merge(base, lora, output, dtype=dtype, threads=threads, report=False)
            outputs.append(snapshot(output))
        assert outputs[0] == outputs[1]


@schemes
def test_two_adapters_and_dora(scheme: Scheme, tmp_path: Path) -> None:
    base = quantised_base(tmp_path / "base", scheme)
    plain, rescaled = adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=2, use_dora=True)
    merged = tmp_path / "merged"
    options: dict[str, Any] = {"strategy": "weighted", "weights": [0.5, -0.25]}
    lorafast.merge(base, [plain, rescaled], merged, **options)
    before, after = read_checkpoint(base), read_checkpoint(merged)
    file = read_checkpoint(rescaled / "adapter_model.safetensors")
    for module in MERGED:
        start = dequantised(scheme, before, module)
        whole = start + delta(rescaled, module)
        magnitude = file[f"{PREFIX}{module}.lora_magnitude_vector"].float64()[:, None]
        turned = magnitude * whole / np.linalg.norm(whole, axis=1, keepdims=True)
        exact = start + 0.5 * delta(plain, module) - 0.25 * (turned - start)
        assert_quantised(scheme, after, module, exact)
    outcome = lorafast.verify(base, [plain, rescaled], merged, full=True, **options)
    assert outcome.ok, outcome.problems


@schemes
def test_verify_names_what_is_damaged(scheme: Scheme, tmp_path: Path) -> None:
    base, lora = quantised_base(tmp_path / "base", scheme, shards=1), adapter(tmp_path / "adapter")
    name = "model.layers.0.q_proj.weight"
    tensors = read_checkpoint(base)
    codes = f"{name}_packed" if f"{name}_packed" in tensors else name
    for number, damaged in enumerate([codes, f"{name}_scale"]):
        merged = tmp_path / f"merged-{number}"
        lorafast.merge(base, lora, merged)
        path = merged / "model.safetensors"
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        start, _ = json.loads(data[8 : 8 + length])[damaged]["data_offsets"]
        # Of a scale in 16 or 32 bits the exponent, of one in 8 bits anything.
        last = {"BF16": 1, "F32": 3}.get(tensors[damaged].dtype, 0)
        data[8 + length + start + last] ^= 0x34 if last == 0 else 0x02
        path.write_bytes(data)
        outcome = lorafast.verify(base, lora, merged, full=True)
        assert not outcome.ok
        assert len(outcome.problems) == 1
        assert name in outcome.problems[0]


def one_weight(path: Path, tensors: dict[str, Tensor], scheme: Scheme) -> tuple[Path, Path]:
    config = {"quantization_config": dict(scheme.config)}
    base = make_base(path / "base", modules={}, others=tensors, config=config)
    lora = adapter_tensors({"x": (8, 64)})
    return base, make_adapter(path / "adapter", lora, target_modules=["x"])


NVFP4, INT8, WORDS = nvfp4(1 / 1000), integers("int8", (1, 1 << 30)), PACKED[-1]
DAMAGED: dict[str, tuple[Scheme, dict[str, Tensor | None], str]] = {
    "no global scale": (
        NVFP4,
        {"x.weight_global_scale": None},
        r"x\.weight, which has no x\.weight_global_scale beside it",
    ),
    "a global scale of zero": (
        NVFP4,
        {"x.weight_global_scale": tensor(np.zeros(1))},
        r"x\.weight_global_scale of 0e0, which is no scale",
    ),
    "scales of another shape": (
        NVFP4,
        {"x.weight_scale": Tensor("F8_E4M3", (8, 3), bytes(24))},
        r"x\.weight_scale of shape \[8, 3\], which does not fit \[8, 64\] in runs of 16",
    ),
    "no scales": (NVFP4, {"x.weight_scale": None}, r"has no x\.weight_scale beside it"),
    "another dtype of scales": (
        NVFP4,
        {"x.weight_scale": Tensor("I16", (8, 4), bytes(64))},
        r"x\.weight_scale stored as I16",
    ),
    "zero points": (
        INT8,
        {"x.weight_zero_point": Tensor("I8", (8, 1), bytes([3] * 8))},
        r"zero points \(x\.weight_zero_point\), which are not read",
    ),
    "a shape that is not the words'": (
        WORDS,
        {"x.weight_shape": tensor(np.array([8, 60]), "I64")},
        r"x\.weight_packed of shape \[8, 8\], which holds no \[8, 60\] integers",
    ),
    "no shape": (WORDS, {"x.weight_shape": None}, r"has no x\.weight_shape beside it"),
    "another order": (
        WORDS,
        {"x.weight_g_idx": tensor(np.zeros(64), "I32")},
        r"in the order of activations \(x\.weight_g_idx\)",
    ),
    "scales that fit nothing": (
        INT8,
        {"x.weight_scale": tensor(np.ones((3, 1)))},
        r"x\.weight_scale of shape \[3, 1\], which does not fit \[8, 64\]",
    ),
    "stored twice": (NVFP4, {"x.weight": tensor(np.ones((8, 64)))}, "is stored twice"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_layout_that_cannot_be_read_is_one_sentence(case: str, tmp_path: Path) -> None:
    scheme, others, message = DAMAGED[case]
    tensors: dict[str, Any] = scheme.quantise("x.weight", np.full((8, 64), 0.5)) | others
    tensors = {name: value for name, value in tensors.items() if value is not None}
    base, lora = one_weight(tmp_path, tensors, scheme)
    with pytest.raises(lorafast.LorafastError, match=message) as caught:
        lorafast.plan(base, lora)
    assert "merge into the unquantised base instead" in str(caught.value)
    with pytest.raises(lorafast.LorafastError, match="cannot be written as float32"):
        lorafast.plan(base, lora, dtype="float32")


def test_zero_points_of_zero_are_none(tmp_path: Path) -> None:
    tensors = INT8.quantise("x.weight", np.full((8, 64), 0.5))
    tensors["x.weight_zero_point"] = Tensor("I8", (8, 1), bytes(8))
    base, lora = one_weight(tmp_path, tensors, INT8)
    lorafast.merge(base, lora, tmp_path / "merged", verify=True)
    lorafast.merge(base, lora, tmp_path / "wide", dtype="bfloat16", verify=True)
    assert read_checkpoint(tmp_path / "wide").keys() == {"x.weight", "model.norm.weight"}


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_scale_that_is_no_number_is_named(dtype: str, tmp_path: Path) -> None:
    tensors = NVFP4.quantise("x.weight", np.full((8, 64), 0.5))
    scales = bytearray(tensors["x.weight_scale"].data)
    scales[7] = 0x7F
    tensors["x.weight_scale"] = Tensor("F8_E4M3", (8, 4), bytes(scales))
    base, lora = one_weight(tmp_path, tensors, NVFP4)
    with pytest.raises(lorafast.LorafastError, match=r"weight_scale has a scale .*block 7\)"):
        lorafast.merge(base, lora, tmp_path / "merged", dtype=dtype)
    assert not (tmp_path / "merged").exists()


def test_a_weight_beyond_the_number_for_the_whole_tensor(tmp_path: Path) -> None:
    """The largest scale is 448: what no code reaches with it is an error, not a smaller weight."""
    scheme = nvfp4(1 / 5000)
    base, _ = one_weight(tmp_path, scheme.quantise("x.weight", np.full((8, 64), 0.5)), scheme)
    near = adapter_tensors({"x": (8, 64)}, scale=0.02)
    lora = make_adapter(tmp_path / "near lora", near, target_modules=["x"])
    far = adapter_tensors({"x": (8, 64)}, scale=1.0)
    far_lora = make_adapter(tmp_path / "far", far, target_modules=["x"])
    lorafast.merge(base, lora, tmp_path / "near", verify=True)
    with pytest.raises(lorafast.LorafastError, match=r"which is beyond what its largest scale"):
        lorafast.merge(base, far_lora, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    lorafast.merge(base, far_lora, tmp_path / "wide", dtype="bfloat16", verify=True)


def test_what_is_shown(tmp_path: Path) -> None:
    base, lora = quantised_base(tmp_path / "base", NVFP4), adapter(tmp_path / "adapter")
    shown = lorafast.inspect(base).to_dict()
    assert "NVFP4 with a scale of 8 bits for every 16 weights" in json.dumps(shown)
    plan = lorafast.plan(base, lora)
    actions = {entry["name"]: entry["action"] for entry in plan.to_dict()["tensors"]}
    assert actions["model.layers.0.q_proj.weight_packed"] == "merge"
    assert actions["model.layers.0.q_proj.weight_scale"] == "rescale"
    assert actions["model.layers.0.q_proj.weight_global_scale"] == "copy"
    wide = lorafast.plan(base, lora, dtype="bfloat16").to_dict()
    actions = {entry["name"]: entry["action"] for entry in wide["tensors"]}
    assert actions["model.layers.0.q_proj.weight"] == "merge"
    assert actions["model.layers.1.up_proj.weight"] == "cast"
    assert "model.layers.0.q_proj.weight_packed" not in actions


def test_an_analysis_beside_such_a_base(tmp_path: Path) -> None:
    base, lora = quantised_base(tmp_path / "base", NVFP4), adapter(tmp_path / "adapter")
    result = lorafast.analyze(lora, base=base)
    assert "stores it as integers" in json.dumps(result.to_dict())


def test_a_flattened_adapter_finds_its_modules(tmp_path: Path) -> None:
    """kohya's keys are the base's modules, whose weights have no name of their own in the file."""
    from support.files import write_safetensors

    base = quantised_base(tmp_path / "base", NVFP4)
    lora = adapter(tmp_path / "adapter")
    factors = read_checkpoint(lora / "adapter_model.safetensors")
    flat = {}
    for module in MERGED:
        key = "lora_unet_" + module.replace(".", "_")
        flat[f"{key}.lora_down.weight"] = factors[f"{PREFIX}{module}.lora_A.weight"]
        flat[f"{key}.lora_up.weight"] = factors[f"{PREFIX}{module}.lora_B.weight"]
        flat[f"{key}.alpha"] = tensor(np.float64(8))
    write_safetensors(tmp_path / "kohya.safetensors", flat)
    for output, source in (("one", lora), ("other", tmp_path / "kohya.safetensors")):
        lorafast.merge(base, source, tmp_path / output, report=False)
    assert read_checkpoint(tmp_path / "one") == read_checkpoint(tmp_path / "other")
