"""Quantised bases: dequantised, merged, quantised again with the same scheme; or written out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._cli.main import main
from support.files import Tensor, narrow, read_checkpoint, snapshot, tensor, widen
from support.handmade import (
    PREFIX,
    adapter_tensors,
    make_adapter,
    make_base,
    write_checkpoint,
)
from support.quantised import SCHEMES, Float64, Scheme, float32

# The first fits no block. The second is encoded in several units, which begin between the tiles'
# beginnings, and is taller than blocks that are held whole. The third is of odd size.
MERGED = {
    "model.layers.0.q_proj": (300, 260),
    "model.layers.0.up_proj": (600, 1100),
    "model.layers.1.q_proj": (51, 37),
}
UNTOUCHED = {"model.layers.1.up_proj": (130, 64)}
SCALE = 8 / 4

schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def quantised_base(path: Path, scheme: Scheme, shards: int = 2, **config: Any) -> Path:
    random = np.random.default_rng(11)
    others: dict[str, Tensor] = {}
    for module, shape in (MERGED | UNTOUCHED).items():
        # Rows of different sizes, so that a scale in the wrong place shows.
        sizes = np.exp(random.normal(size=(shape[0], 1)))
        weight = random.normal(scale=0.05, size=shape) * sizes
        others |= scheme.quantise(f"{module}.weight", weight)
    if scheme.name.startswith("fp8"):
        others["model.layers.0.q_proj.input_scale"] = tensor(np.float64(0.5))
    return make_base(
        path,
        modules={},
        dtype="BF16",
        shards=shards,
        config={"quantization_config": dict(scheme.config)} | config,
        others=others,
    )


def adapter(path: Path, seed: int = 1, **settings: Any) -> Path:
    tensors = adapter_tensors(MERGED, seed=seed, scale=0.15)
    if settings.get("use_dora"):
        random = np.random.default_rng(seed)
        for module, (rows, _) in MERGED.items():
            name = f"{PREFIX}{module}.lora_magnitude_vector"
            tensors[name] = tensor(np.exp(random.normal(size=rows)))
    return make_adapter(path, tensors, **settings)


def delta(path: Path, module: str) -> Float64:
    tensors = read_checkpoint(path / "adapter_model.safetensors")
    a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].float64() for side in "AB")
    product: Float64 = SCALE * b @ a
    return product


def noise(path: Path, module: str, start: Float64) -> Float64:
    """What a float32 sum can be off: relative to the sizes of its terms."""
    tensors = read_checkpoint(path / "adapter_model.safetensors")
    a, b = (np.abs(tensors[f"{PREFIX}{module}.lora_{side}.weight"].float64()) for side in "AB")
    bound: Float64 = 2.0**-22 * (np.abs(start) + SCALE * b @ a)
    return bound


def dequantised(scheme: Scheme, tensors: Mapping[str, Tensor], module: str) -> Float64:
    return scheme.dequantise(tensors, f"{module}.weight", (MERGED | UNTOUCHED)[module])


def assert_quantised(scheme: Scheme, tensors: Mapping[str, Tensor], module: str, exact: Float64):
    """Scales are those of the exact weights, and each code is the nearest one for its scale."""
    name = f"{module}.weight"
    codes, scales = scheme.load(tensors, name, exact.shape)
    right = scheme.scales_for(exact)
    if "nested" in scheme.name:
        # Quantised themselves: to 256 values, the farthest neighbours 0.014 of the largest apart.
        outer = tensors[f"{name}.nested_absmax"].float64()
        assert np.all(np.abs(scales - right) <= 0.008 * outer[np.arange(right.size) // 256])
    else:
        np.testing.assert_allclose(scales, right, rtol=2e-6 if "rows" not in scheme.name else 2e-2)
        right = scales
    blocks = scheme.blocks(exact.shape)
    unit = right[blocks]
    stored = scheme.table[codes].reshape(exact.shape) * unit
    nearest = scheme.table[scheme.nearest(exact, right)] * unit
    # Where two codes are as near as float32 can tell, either is right.
    noise = 1e-6 * (np.abs(exact) + unit * scheme.largest * 1e-1)
    assert np.all(np.abs(stored - exact) <= np.abs(nearest - exact) + noise)


@schemes
def test_the_scheme_is_kept(scheme: Scheme, tmp_path: Path) -> None:
    base, lora = quantised_base(tmp_path / "base", scheme), adapter(tmp_path / "adapter")
    report = lorafast.merge(base, lora, tmp_path / "merged")
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "merged")
    assert before.keys() == after.keys()
    touched = tuple(f"{module}." for module in MERGED)
    for name, value in before.items():
        assert (value.dtype, value.shape) == (after[name].dtype, after[name].shape)
        if not name.startswith(touched) or name.endswith(("map", "input_scale", "format")):
            assert value.data == after[name].data, name
    for module in MERGED:
        exact = dequantised(scheme, before, module) + delta(lora, module)
        assert_quantised(scheme, after, module, exact)
        assert before[f"{module}.weight"].data != after[f"{module}.weight"].data
    assert (base / "config.json").read_bytes() == (tmp_path / "merged/config.json").read_bytes()
    assert any("quantised again with the same scheme" in note for note in report.notes)
    assert report.tensors_merged == len(MERGED)
    for full in (False, True):
        outcome = lorafast.verify(base, lora, tmp_path / "merged", full=full)
        assert outcome.ok, outcome.problems
        assert outcome.tensors_merged == len(MERGED)
    # The merge measured all of it, before a nested scheme quantises the scales.
    error = change = 0.0
    for module in MERGED:
        start, asked = dequantised(scheme, before, module), delta(lora, module)
        error += np.square(dequantised(scheme, after, module) - start - asked).sum()
        change += np.square(asked).sum()
    assert report.rounding is not None
    assert report.rounding["lost"] == pytest.approx(np.sqrt(error / change), rel=0.05)
    assert report.rounding["values"] == sum(delta(lora, module).size for module in MERGED)
    warned = any("rounding takes away" in warning for warning in report.warnings)
    assert warned == (report.rounding["lost"] >= 0.2)


@schemes
def test_the_bytes_do_not_depend_on_threads(scheme: Scheme, tmp_path: Path) -> None:
    base, lora = quantised_base(tmp_path / "base", scheme), adapter(tmp_path / "adapter")
    for dtype in ("auto", "float16"):
        outputs = []
        for threads in (1, 2, 7):
            output = tmp_path / f"{dtype}-{threads}"
            lorafast.merge(base, lora, output, dtype=dtype, threads=threads, report=False)
            outputs.append(snapshot(output))
        assert outputs[0] == outputs[1] == outputs[2]


@schemes
def test_written_out(scheme: Scheme, tmp_path: Path) -> None:
    base, lora = quantised_base(tmp_path / "base", scheme), adapter(tmp_path / "adapter")
    (base / "hf_quant_config.json").write_text("{}")
    merged = tmp_path / "merged"
    report = lorafast.merge(base, lora, merged, dtype="bfloat16", verify=True)
    before, after = read_checkpoint(base), read_checkpoint(merged)
    weights = {f"{module}.weight" for module in MERGED | UNTOUCHED}
    assert after.keys() == weights | {"model.norm.weight"}
    for module in UNTOUCHED:
        expected = narrow(dequantised(scheme, before, module), "BF16")
        assert after[f"{module}.weight"].data == expected
    for module, shape in MERGED.items():
        start, change = dequantised(scheme, before, module), delta(lora, module)
        exact = start + change
        got = after[f"{module}.weight"]
        assert (got.dtype, got.shape) == ("BF16", shape)
        half_ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 2.0**-126))) - 8)
        bound = half_ulp + noise(lora, module, start)
        assert np.all(np.abs(got.float64() - exact) <= bound)
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "bfloat16"
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(len(value.data) for value in after.values())
    assert not (merged / "hf_quant_config.json").exists()
    assert "hf_quant_config.json" not in report.side_files
    # Whoever wrote them out: without being told, from the base as it is.
    outcome = lorafast.verify(base, lora, merged)
    assert outcome.ok, outcome.problems


@schemes
def test_what_does_not_change_keeps_its_bytes(scheme: Scheme, tmp_path: Path) -> None:
    base = quantised_base(tmp_path / "base", scheme, shards=1)
    tensors = adapter_tensors(MERGED)
    for name, value in tensors.items():
        if "lora_B" in name:
            tensors[name] = tensor(np.zeros(value.shape))
    lorafast.merge(base, make_adapter(tmp_path / "adapter", tensors), tmp_path / "merged")
    file = "model.safetensors"
    assert (base / file).read_bytes() == (tmp_path / "merged" / file).read_bytes()


@schemes
def test_two_adapters_and_dora(scheme: Scheme, tmp_path: Path) -> None:
    base = quantised_base(tmp_path / "base", scheme)
    plain, rescaled = adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=2, use_dora=True)
    merged = tmp_path / "merged"
    lorafast.merge(base, [plain, rescaled], merged, strategy="weighted", weights=[0.5, -0.25])
    before, after = read_checkpoint(base), read_checkpoint(merged)
    file = read_checkpoint(rescaled / "adapter_model.safetensors")
    for module in MERGED:
        start = dequantised(scheme, before, module)
        whole = start + delta(rescaled, module)
        magnitude = file[f"{PREFIX}{module}.lora_magnitude_vector"].float64()[:, None]
        turned = magnitude * whole / np.linalg.norm(whole, axis=1, keepdims=True)
        exact = start + 0.5 * delta(plain, module) - 0.25 * (turned - start)
        assert_quantised(scheme, after, module, exact)
    options: dict[str, Any] = {"strategy": "weighted", "weights": [0.5, -0.25], "full": True}
    outcome = lorafast.verify(base, [plain, rescaled], merged, **options)
    assert outcome.ok, outcome.problems


@schemes
def test_verify_takes_a_merge_of_another_hand(scheme: Scheme, tmp_path: Path) -> None:
    """NumPy's, from float64: other scales in the last place, and so a few other codes."""
    base, lora = quantised_base(tmp_path / "base", scheme, shards=1), adapter(tmp_path / "adapter")
    tensors = read_checkpoint(base)
    for module in MERGED:
        exact = dequantised(scheme, tensors, module) + delta(lora, module)
        tensors |= scheme.quantise(f"{module}.weight", exact)
    merged = make_base(tmp_path / "merged", modules={}, others=tensors, dtype="BF16")
    outcome = lorafast.verify(base, lora, merged, full=True)
    assert outcome.ok, outcome.problems


def damage(path: Path, name: str, change: Any) -> None:
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    start, end = start + 8 + length, end + 8 + length
    data[start:end] = change(bytes(data[start:end]))
    path.write_bytes(data)


@schemes
def test_verify_names_what_is_damaged(scheme: Scheme, tmp_path: Path) -> None:
    base, lora = quantised_base(tmp_path / "base", scheme, shards=1), adapter(tmp_path / "adapter")
    module = "model.layers.0.q_proj"
    name = f"{module}.weight"
    tensors = scheme.quantise(name, np.linspace(-1, 3, 300 * 260).reshape(300, 260))
    scale = next(
        n for n in tensors if n.endswith(("_scale", "_inv", "absmax", "SCB")) and n != name
    )

    def other_code(data: bytes) -> bytes:
        middle = 300 * 260 // 4
        return data[:middle] + bytes([data[middle] ^ 0x40]) + data[middle + 1 :]

    def other_scale(data: bytes) -> bytes:
        stored = tensors[scale]
        if stored.dtype in {"F8_E8M0", "U8"}:
            return bytes([data[0] + 9]) + data[1:]
        size = len(stored.data) // max(1, int(np.prod(stored.shape)))
        return narrow(4 * widen(stored.dtype, data[:size]), stored.dtype) + data[size:]

    for number, (damaged, change) in enumerate([(name, other_code), (scale, other_scale)]):
        merged = tmp_path / f"merged-{number}"
        lorafast.merge(base, lora, merged)
        damage(merged / "model.safetensors", damaged, change)
        outcome = lorafast.verify(base, lora, merged)
        assert not outcome.ok
        assert len(outcome.problems) == 1
        assert name in outcome.problems[0]
    lorafast.merge(base, lora, tmp_path / "plain")
    # The base itself is no merge of anything.
    assert not lorafast.verify(base, lora, base).ok


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    """Bands of rows that end within blocks, of which some experts' change and some do not."""
    experts, rows, columns, rank = 3, 200, 140, 4
    scheme = SCHEMES[0]
    random = np.random.default_rng(4)
    name, path = "model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts"
    one = [
        scheme.quantise("w", random.normal(scale=0.05 * 4.0**e, size=(rows, columns)))
        for e in range(experts)
    ]

    def stacked(key: str) -> Tensor:
        parts = [tensors[key] for tensors in one]
        shape = (experts, *parts[0].shape)
        return Tensor(parts[0].dtype, shape, b"".join(part.data for part in parts))

    base = make_base(
        tmp_path / "base",
        modules={},
        dtype="BF16",
        config={"quantization_config": dict(scheme.config)},
        others={name: stacked("w"), f"{name}_scale_inv": stacked("w_scale_inv")},
    )
    a, b = random.normal(size=(rank * experts, columns)), random.normal(size=(rows, rank * experts))
    a[rank : 2 * rank] = 0
    lora = make_adapter(
        tmp_path / "adapter",
        {
            f"{PREFIX}{path}.lora_A.weight": tensor(0.1 * a),
            f"{PREFIX}{path}.lora_B.weight": tensor(0.1 * b),
        },
        target_modules=[],
        target_parameters=["mlp.experts.down_proj"],
        peft_version="0.21.0",
    )
    lorafast.merge(base, lora, tmp_path / "merged", verify=True)
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "merged")
    factors = read_checkpoint(lora / "adapter_model.safetensors")
    a, b = (factors[f"{PREFIX}{path}.lora_{side}.weight"].float64() for side in "AB")
    for expert in range(experts):

        def cut(tensors: Mapping[str, Tensor], expert: int = expert) -> dict[str, Tensor]:
            cuts = {}
            for key, of in (("w.weight", name), ("w.weight_scale_inv", f"{name}_scale_inv")):
                whole = tensors[of]
                size = len(whole.data) // experts
                data = whole.data[expert * size : (expert + 1) * size]
                cuts[key] = Tensor(whole.dtype, whole.shape[1:], data)
            return cuts

        start = scheme.dequantise(cut(before), "w.weight", (rows, columns))
        product = b[:, expert::experts] @ a[expert * rank : (expert + 1) * rank]
        assert_quantised(scheme, cut(after), "w", start + SCALE * product)
        assert (cut(before) == cut(after)) == (expert == 1)
    lorafast.merge(base, lora, tmp_path / "wide", dtype="float32", verify=True)
    assert read_checkpoint(tmp_path / "wide")[name].shape == (experts, rows, columns)


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[7]], ids=["fp8", "nf4-nested"])
def test_a_new_vocabulary_beside_quantised_layers(scheme: Scheme, tmp_path: Path) -> None:
    """The shards have another layout then, and the scales lie elsewhere."""
    base = quantised_base(tmp_path / "base", scheme, tie_word_embeddings=False, vocab_size=9)
    tensors = read_checkpoint(base)
    saved = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensor(np.zeros((9, 20)), "BF16")
        saved[f"{PREFIX}{name}"] = tensor(np.ones((12, 20)), "BF16")
    for old in base.glob("*.safetensors*"):
        old.unlink()
    write_checkpoint(base, tensors, shards=2)
    lora = make_adapter(
        tmp_path / "adapter",
        adapter_tensors(MERGED, scale=0.15) | saved,
        modules_to_save=["embed_tokens", "lm_head"],
    )
    lorafast.merge(base, lora, tmp_path / "merged", verify=True)
    after = read_checkpoint(tmp_path / "merged")
    assert after["lm_head.weight"].shape == (12, 20)
    for module in MERGED:
        exact = dequantised(scheme, tensors, module) + delta(lora, module)
        assert_quantised(scheme, after, module, exact)


def test_a_tied_head_that_would_have_to_be_quantised(tmp_path: Path) -> None:
    weights = SCHEMES[0].quantise("model.embed_tokens.weight", np.ones((40, 20)))
    base = make_base(
        tmp_path / "base",
        modules={},
        others=weights,
        config={"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    )
    tensors = adapter_tensors({"lm_head": (40, 20)})
    lora = make_adapter(tmp_path / "adapter", tensors, target_modules=["lm_head"])
    for dtype in ("auto", "bfloat16"):
        with pytest.raises(lorafast.LorafastError, match="unquantised base"):
            lorafast.plan(base, lora, dtype=dtype)


def test_an_adapter_that_overflows(tmp_path: Path) -> None:
    """Under every way of finding scales the error is the overflow, and nothing is written."""
    for scheme in (SCHEMES[0], SCHEMES[3], SCHEMES[7]):
        base = quantised_base(tmp_path / scheme.name, scheme)
        lora = make_adapter(tmp_path / f"{scheme.name}-lora", adapter_tensors(MERGED, scale=1e25))
        for threads in (1, 3):
            with pytest.raises(lorafast.LorafastError, match="makes a finite weight NaN or"):
                lorafast.merge(base, lora, tmp_path / "merged", threads=threads)
            assert not (tmp_path / "merged").exists()


def test_a_saved_module_in_the_place_of_a_quantised_one(tmp_path: Path) -> None:
    base = quantised_base(tmp_path / "base", SCHEMES[6])
    (module, shape), *_ = MERGED.items()
    saved = {f"{PREFIX}{module}.weight": tensor(np.ones(shape))}
    lora = make_adapter(tmp_path / "adapter", saved, modules_to_save=["q_proj"])
    with pytest.raises(lorafast.LorafastError, match=r"replaces .*bitsandbytes nf4.*unquantised"):
        lorafast.plan(base, lora)


def test_what_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, lora = quantised_base(tmp_path / "base", SCHEMES[0]), adapter(tmp_path / "adapter")
    assert main(["inspect", str(base)]) == 0
    scheme = "fp8 (E4M3) with a scale for each block of 128 × 128"
    assert f"quantised 4 × {scheme}" in " ".join(capsys.readouterr().out.split())
    assert main(["merge", "--base", str(base), "--adapters", str(lora), "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 tensors with the scales of what changes" in shown
    assert f"quantised again with the same scheme (3 × {scheme})" in shown
    plan = lorafast.plan(base, lora).to_dict()
    actions = {entry["name"]: entry["action"] for entry in plan["tensors"]}
    assert actions["model.layers.0.q_proj.weight"] == "merge"
    assert actions["model.layers.0.q_proj.weight_scale_inv"] == "rescale"
    assert actions["model.layers.1.up_proj.weight_scale_inv"] == "copy"
    (entry,) = (e for e in plan["tensors"] if e["name"] == "model.layers.0.q_proj.weight")
    assert (entry["quantised"], entry["dtype"]) == (scheme, "F8_E4M3")


def test_fp8_without_scales(tmp_path: Path) -> None:
    """A float type like others: rounded once, and an error where it cannot hold the sum."""
    random = np.random.default_rng(3)
    e4m3 = SCHEMES[0].table
    codes = random.integers(0, 120, size=(30, 20)).astype(np.uint8)
    base = make_base(
        tmp_path / "base",
        modules={},
        dtype="BF16",
        others={"x.weight": Tensor("F8_E4M3", (30, 20), codes.tobytes())},
    )
    lora = make_adapter(tmp_path / "adapter", adapter_tensors({"x": (30, 20)}, scale=3.0))
    lorafast.merge(base, lora, tmp_path / "merged", verify=True)
    stored = read_checkpoint(tmp_path / "merged")["x.weight"]
    exact = e4m3[codes] + delta(lora, "x")
    finite = np.where(np.isfinite(e4m3), e4m3, np.inf)
    nearest = np.abs(exact[..., None] - finite).min(axis=-1)
    error = np.abs(e4m3[np.frombuffer(stored.data, np.uint8)].reshape(30, 20) - exact)
    assert np.all(error <= nearest + 1e-6 * np.abs(exact))
    far = make_adapter(tmp_path / "far", adapter_tensors({"x": (30, 20)}, scale=30.0))
    with pytest.raises(lorafast.LorafastError, match=r"x\.weight.*beyond what F8_E4M3 holds"):
        lorafast.merge(base, far, tmp_path / "beyond")
    assert not (tmp_path / "beyond").exists()
    lorafast.merge(base, far, tmp_path / "wide", dtype="bfloat16", verify=True)
    exact = float32(e4m3[codes]) + delta(far, "x")
    wide = read_checkpoint(tmp_path / "wide")["x.weight"].float64()
    np.testing.assert_allclose(wide, exact, rtol=2.0**-8, atol=1e-3)


def test_a_scale_that_fits_nothing_is_named(tmp_path: Path) -> None:
    scheme = SCHEMES[0]
    weights = scheme.quantise("x.weight", np.ones((300, 260)))
    weights["x.weight_scale_inv"] = tensor(np.ones((2, 7)))
    base = make_base(tmp_path / "base", modules={}, others=weights)
    lora = make_adapter(tmp_path / "adapter", adapter_tensors({"x": (300, 260)}))
    with pytest.raises(lorafast.LorafastError, match=r"x\.weight_scale_inv of shape \[2, 7\]"):
        lorafast.plan(base, lora)
    with pytest.raises(lorafast.LorafastError, match="cannot be written as float32"):
        lorafast.plan(base, lora, dtype="float32")
