"""What rounding takes away of a merge's changes, as the merge itself measures it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from numpy.typing import NDArray
from support.files import Tensor, read_checkpoint, tensor
from support.handmade import MODULES, make_adapter, make_base
from support.reference import PREFIX, merge_float64

SHAPE = (480, 96)
WIDE = dict.fromkeys(MODULES, SHAPE)


def factors(size: float, seed: int = 5) -> dict[str, Tensor]:
    random = np.random.default_rng(seed)
    tensors = {}
    for module in WIDE:
        a = random.normal(size=(4, SHAPE[1]))
        b = random.normal(scale=size, size=(SHAPE[0], 4))
        tensors[f"{PREFIX}{module}.lora_A.weight"] = tensor(a, "F32")
        tensors[f"{PREFIX}{module}.lora_B.weight"] = tensor(b, "F32")
    return tensors


def lost(base: Path, exact: Path, output: Path) -> float:
    """The true share, over all merged weights."""
    before, right, after = map(read_checkpoint, (base, exact, output))
    error = change = 0.0
    for module in WIDE:
        name = f"{module}.weight"
        start = before[name].float64()
        error += float(np.square(after[name].float64() - right[name].float64()).sum())
        change += float(np.square(right[name].float64() - start).sum())
    return float(np.sqrt(error / change))


@pytest.mark.parametrize("stored", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", [1e-5, 3e-4, 1e-2])
@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_a_merge_measures_what_rounding_takes_away(
    tmp_path: Path, stored: str, dtype: str, size: float, kind: str
) -> None:
    base = make_base(tmp_path / "base", modules=WIDE, dtype=stored)
    tensors = factors(size)
    if kind == "dora":
        random = np.random.default_rng(9)
        for module in WIDE:
            start = read_checkpoint(base)[f"{module}.weight"].float64()
            norms = np.linalg.norm(start, axis=1) * (1 + size * random.normal(size=SHAPE[0]))
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = tensor(norms, "F32")
    adapter = make_adapter(tmp_path / "adapter", tensors, use_dora=kind == "dora")
    lorafast.merge(base, adapter, tmp_path / "exact", dtype="float32")
    report = lorafast.merge(base, adapter, tmp_path / "out", dtype=dtype)
    written = stored if dtype == "auto" else {"b": "BF16", "f": "F16"}[dtype[0]]
    if dtype == "float32":
        written = "F32"
    if written == "F32":
        assert report.rounding is None
        return
    expected = lost(base, tmp_path / "exact", tmp_path / "out")
    assert report.rounding is not None
    # A sample of few rows, and changes that are themselves rounded to 16 bits.
    assert report.rounding["lost"] == pytest.approx(expected, rel=0.2, abs=0.01)
    warned = any("rounding takes away" in warning for warning in report.warnings)
    assert warned == (report.rounding["lost"] >= 0.2)
    checked = lorafast.verify(base, adapter, tmp_path / "out")
    assert report.rounding["lost"] == pytest.approx(checked.lost, rel=0.3, abs=0.01)


@pytest.mark.parametrize("size", [1e-5, 1e-2])
def test_so_does_one_that_torch_makes(tmp_path: Path, size: float) -> None:
    pytest.importorskip("torch")
    base = make_base(tmp_path / "base", modules=WIDE, dtype="BF16")
    adapter = make_adapter(tmp_path / "adapter", factors(size))
    ours = lorafast.merge(base, adapter, tmp_path / "cpu").rounding
    theirs = lorafast.merge(base, adapter, tmp_path / "torch", device="torch:cpu").rounding
    assert ours is not None
    assert theirs is not None
    assert theirs["values"] == len(WIDE) * SHAPE[1]
    assert theirs["lost"] == pytest.approx(ours["lost"], rel=0.2, abs=0.01)


# Updates that are more than a sum, or lie on some rows alone


@dataclass
class Merge:
    """Inputs, and what is right for the tensors that they change, in float64."""

    base: Path
    adapter: Path
    exact: Mapping[str, NDArray[np.float64]]
    options: Mapping[str, Any] = field(default_factory=dict)


def assert_measured(
    report: lorafast.MergeReport,
    base: Path,
    output: Path,
    exact: Mapping[str, NDArray[np.float64]],
    *,
    rel: float = 0.2,
) -> None:
    """That a sample of few rows comes near the true share, over all merged weights."""
    before, after = read_checkpoint(base), read_checkpoint(output)
    error = change = 0.0
    for name, right in exact.items():
        error += float(np.square(after[name].float64() - right).sum())
        change += float(np.square(right - before[name].float64()).sum())
    assert report.rounding is not None
    expected = np.sqrt(error / change)
    assert report.rounding["lost"] == pytest.approx(expected, rel=rel, abs=0.002)
    assert 0 <= report.rounding["unmoved"] <= 1


def pair(module: str, outputs: int, inputs: int, size: float, rank: int = 4) -> dict[str, Tensor]:
    random = np.random.default_rng(5)
    return {
        f"{PREFIX}{module}.lora_A.weight": tensor(random.normal(size=(rank, inputs))),
        f"{PREFIX}{module}.lora_B.weight": tensor(random.normal(scale=size, size=(outputs, rank))),
    }


def reference(
    base: Path, adapter: Path, *, transposed: bool = False
) -> Mapping[str, NDArray[np.float64]]:
    right = merge_float64(read_checkpoint(base), [adapter], transposed=lambda _: transposed)
    return {name: each.value for name, each in right.items()}


def dora(folder: Path, dtype: str, size: float, *, transposed: bool = False) -> Merge:
    shape = SHAPE[::-1] if transposed else SHAPE
    config = {"model_type": "gpt2"} if transposed else {}
    modules = dict.fromkeys(MODULES, shape)
    base = make_base(folder / "base", modules=modules, dtype=dtype, config=config)
    random, tensors = np.random.default_rng(9), factors(size)
    for module in modules:
        start = read_checkpoint(base)[f"{module}.weight"].float64()
        norms = np.linalg.norm(start, axis=0 if transposed else 1)
        norms *= 1 + size * random.normal(size=SHAPE[0])
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = tensor(norms)
    settings = {"use_dora": True, "fan_in_fan_out": transposed}
    adapter = make_adapter(folder / "adapter", tensors, **settings)
    return Merge(base, adapter, reference(base, adapter, transposed=transposed))


def dora_of_columns(folder: Path, dtype: str, size: float) -> Merge:
    return dora(folder, dtype, size, transposed=True)


def replaced(folder: Path, dtype: str, size: float) -> Merge:
    """A part of the way from the base's weights to those that the adapter saved."""
    base = make_base(folder / "base", modules=WIDE, dtype=dtype)
    random = np.random.default_rng(3)
    saved, exact = {}, {}
    for module in WIDE:
        start = read_checkpoint(base)[f"{module}.weight"].float64()
        own = tensor(start + 16 * size * random.normal(size=SHAPE))
        saved[f"{PREFIX}{module}.weight"] = own
        exact[f"{module}.weight"] = start + 0.25 * (own.float64() - start)
    adapter = make_adapter(folder / "adapter", saved, modules_to_save=["q_proj", "up_proj"])
    return Merge(base, adapter, exact, {"strategy": "weighted", "weights": [0.25]})


def experts(folder: Path, dtype: str, size: float) -> Merge:
    module = "model.layers.0.mlp.experts"
    random = np.random.default_rng(4)
    weight = tensor(random.normal(scale=0.05, size=(5, 60, 96)), dtype)
    others = {f"{module}.gate_up_proj": weight}
    base = make_base(folder / "base", dtype=dtype, others=others)
    adapter = make_adapter(
        folder / "adapter",
        pair(module, 60, 96, size, rank=20),
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj"],
        peft_version="0.21.2",
    )
    return Merge(base, adapter, reference(base, adapter))


def trained_rows(folder: Path, dtype: str, size: float) -> Merge:
    """Rows of an embedding, of which the first is not among them."""
    rows, name = [5, 40, 41, 170], "model.embed_tokens.weight"
    random = np.random.default_rng(6)
    embeddings = tensor(random.normal(scale=0.05, size=(200, 480)), dtype)
    base = make_base(folder / "base", dtype=dtype, others={name: embeddings})
    trained = embeddings.float64()[rows] + 4 * size * random.normal(size=(len(rows), 480))
    key = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    adapter = make_adapter(
        folder / "adapter", {key: tensor(trained)}, trainable_token_indices=rows, target_modules=[]
    )
    return Merge(base, adapter, reference(base, adapter))


def parts(folder: Path, dtype: str, size: float) -> Merge:
    """Equal parts of a fused layer, of which the first has no factors."""
    module = "transformer.h.0.attn.c_attn"
    base = make_base(folder / "base", modules={module: SHAPE}, dtype=dtype)
    tensors = pair(module, SHAPE[0] // 3, SHAPE[1], size)
    key = f"{PREFIX}{module}.lora_B.weight"
    tensors[key] = tensor(tensors[key].float64()[:, :, None])
    settings = {"enable_lora": [False, True, False], "merge_weights": False}
    adapter = make_adapter(folder / "adapter", tensors, **settings)
    return Merge(base, adapter, reference(base, adapter))


KINDS = [dora, dora_of_columns, replaced, experts, trained_rows, parts]


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
@pytest.mark.parametrize("size", [2e-5, 1e-4, 3e-3])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_of_every_kind_of_update_on_every_device(
    tmp_path: Path, dtype: str, kind: Callable[..., Merge], size: float, device: str
) -> None:
    if device != "cpu":
        pytest.importorskip("torch")
    made = kind(tmp_path, dtype, size)
    output = tmp_path / "out"
    report = lorafast.merge(made.base, made.adapter, output, device=device, **made.options)
    assert not report.fallbacks
    assert_measured(report, made.base, output, made.exact)


# On a (simulated) CUDA device, where 16-bit sums are made without their float32 values


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-2])
@pytest.mark.parametrize("kind", ["plain", "dora", "dora_of_columns"])
def test_on_cuda(tmp_path: Path, kind: str, size: float, dtype: str) -> None:
    pytest.importorskip("torch")
    from support.simulated_cuda import simulated_cuda

    if kind == "plain":
        base = make_base(tmp_path / "base", modules=WIDE, dtype=dtype)
        adapter = make_adapter(tmp_path / "adapter", factors(size))
        made = Merge(base, adapter, reference(base, adapter))
    else:
        made = dora(tmp_path, dtype, size, transposed=kind == "dora_of_columns")
    output = tmp_path / "out"
    with simulated_cuda() as simulator:
        report = lorafast.merge(made.base, made.adapter, output, device="cuda")
    assert simulator.checker.problems == []
    assert not report.fallbacks
    assert_measured(report, made.base, output, made.exact)
    assert report.rounding is not None
    columns = SHAPE[kind != "dora_of_columns"]
    assert report.rounding["values"] == len(made.exact) * columns


def test_a_change_too_small_for_float32_is_lost(tmp_path: Path) -> None:
    """What a weight has no digits for in float32 either is found where it is only added."""
    pytest.importorskip("torch")
    base = make_base(tmp_path / "base", modules=WIDE, dtype="BF16")
    adapter = make_adapter(tmp_path / "adapter", factors(1e-13))
    report = lorafast.merge(base, adapter, tmp_path / "out", device="torch:cpu")
    assert report.rounding is not None
    assert report.rounding["lost"] == pytest.approx(1.0)
    assert report.rounding["unmoved"] > 0.99


def test_of_every_sixteenth_tile_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from lorafast._torch import file_merge

    made = dora(tmp_path, "BF16", 1e-4)
    # Tiles of eight rows, sixty of them.
    monkeypatch.setitem(file_merge.TILE_BYTES, "cpu", 8 * 2 * SHAPE[1])
    output = tmp_path / "out"
    report = lorafast.merge(made.base, made.adapter, output, device="torch:cpu")
    assert report.rounding is not None
    assert report.rounding["values"] == len(WIDE) * 4 * SHAPE[1]
    assert_measured(report, made.base, output, made.exact, rel=0.1)
