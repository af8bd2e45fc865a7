"""Every entry of the matrix through the torch executor, against float64 and the CPU's backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
import torch
from lorafast._torch import file_merge, program
from matrix import FEATURES, Entry, Feature
from support.compare import (
    FLOAT32_SUM,
    assert_merged_like_float64,
    assert_rest_untouched,
    ulp_distance,
)
from support.files import Tensor, read_checkpoint, tensor
from support.handmade import write_checkpoint
from support.models import Models
from support.reference import Merged, merge_float64
from support.simulated_cuda import opened
from test_matrix import FEW_PAIRS, IDENTICAL, make_adapters
from toys import Toys, is_transposed

DEVICES = [
    "torch:cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
        ],
    ),
]
CASES = [
    pytest.param(feature, entry, id=f"{feature.name}-{entry.name}".replace(" ", "_"))
    for feature in FEATURES
    for entry in feature.entries
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and buffers are full of NaN before anything is computed."""
    begin, slot = file_merge._Merge.__init__, file_merge._Merge._slot

    def poisoned_begin(self: Any, plan: Any, execution: Any, device: Any, **options: Any) -> None:
        sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
        for merged in plan.changed_tensors():
            if merged["updates"] and not merged["quantised"]:
                size = merged["rows"] * merged["columns"] * sizes[merged["output_dtype"]]
                execution.write_rows(merged["place"], 0, np.full(size, 0xFF, np.uint8))
        begin(self, plan, execution, device, **options)

    def poisoned_slot(self: Any, *sizes: int) -> Any:
        made = slot(self, *sizes)
        for buffer in (made.source, made.target, made.exact):
            buffer.fill_(0xFF)
        return made

    monkeypatch.setattr(file_merge._Merge, "__init__", poisoned_begin)
    monkeypatch.setattr(file_merge._Merge, "_slot", poisoned_slot)


def assert_like_the_cpu(
    ours: dict[str, Tensor], cpu: dict[str, Tensor], terms: dict[str, Merged]
) -> None:
    """16-bit within 1 ulp, float32 within 1e-6, but where terms cancel to less than they are."""
    for name, term in terms.items():
        error = np.abs(ours[name].float64() - cpu[name].float64())
        cancelled = error <= FLOAT32_SUM * term.magnitude
        if ours[name].dtype in {"F16", "BF16"}:
            assert ((ulp_distance(ours[name], cpu[name]) <= 1) | cancelled).all(), name
        else:
            assert ((error <= 1e-6 * np.abs(cpu[name].float64())) | cancelled).all(), name


def check_entry(
    toys: Toys,
    folder: Path,
    feature: Feature,
    entry: Entry,
    *,
    pair: tuple[str, str],
    device: str,
) -> None:
    transposed = is_transposed(entry.base, entry.configs[0])
    base_dtype, adapter_dtype = pair
    base = toys.base(entry.base, base_dtype)
    adapters = make_adapters(toys, feature, entry, adapter_dtype)
    name = f"{base_dtype}-{adapter_dtype}"
    lorafast.merge(base, adapters, folder / f"cpu-{name}")
    with opened(device) as torchs_name:
        report = lorafast.merge(base, adapters, folder / name, device=torchs_name)
    assert report.device.startswith(torchs_name)
    assert report.fallbacks == {}
    before = read_checkpoint(base)
    ours, cpu = read_checkpoint(folder / name), read_checkpoint(folder / f"cpu-{name}")
    terms = merge_float64(before, adapters, transposed=transposed)
    assert_rest_untouched(ours, before, terms)
    assert_merged_like_float64(ours, terms, identical=IDENTICAL)
    assert_like_the_cpu(ours, cpu, terms)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("feature", "entry"), CASES)
def test_entry(models: Models, tmp_path: Path, feature: Feature, entry: Entry, device: str) -> None:
    for pair in FEW_PAIRS:
        check_entry(Toys(models), tmp_path, feature, entry, pair=pair, device=device)


#: What is merged on the simulated device: features with the number of an entry.
SIMULATED = {
    "Linear": 1,
    "Embedding": 1,
    "Conv1d, Conv2d, Conv3d": 0,
    "`lora_bias`": 1,
    "`bias='all'`, `'lora_only'`": 0,
    "`modules_to_save`": 0,
    "DoRA on Linear": 3,
    "DoRA on Conv1D of GPT-2": 0,
    "DoRA on embeddings": 0,
    "`target_parameters`": 1,
    "`trainable_token_indices`": 1,
    "`nn.MultiheadAttention`": 1,
    "PiSSA": 0,
    "Two and three adapters": 1,
    "Several DoRA adapters": 2,
}


@pytest.mark.parametrize("name", SIMULATED)
def test_a_share_on_the_simulated_device(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # So small that most tensors are several tiles.
    monkeypatch.setitem(file_merge.TILE_BYTES, "cuda", 2048)
    (feature,) = [feature for feature in FEATURES if feature.name == name]
    position = list(SIMULATED).index(name)
    pair = FEW_PAIRS[position % len(FEW_PAIRS)]
    entry = feature.entries[SIMULATED[name]]
    check_entry(Toys(models), tmp_path, feature, entry, pair=pair, device="simulated")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_both_ways_to_add_in_16_bits(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, fused: bool
) -> None:
    used = []
    apply = program.Program.apply

    def noted(self: Any, *arguments: Any) -> Any:
        used.append(self.fused)
        return apply(self, *arguments)

    monkeypatch.setattr(program, "rounds_once", lambda *arguments: fused)
    monkeypatch.setattr(program.Program, "apply", noted)
    toys = Toys(models)
    (feature,) = [feature for feature in FEATURES if feature.name == "Two and three adapters"]
    entry = feature.entries[1]
    base, adapters = toys.base("layers", dtype), make_adapters(toys, feature, entry, "F32")
    lorafast.merge(base, adapters, tmp_path / "out", device="torch:cpu")
    terms = merge_float64(
        read_checkpoint(base), adapters, transposed=is_transposed("layers", entry.configs[0])
    )
    assert used == [fused] * len(terms)
    assert_merged_like_float64(read_checkpoint(tmp_path / "out"), terms, identical=IDENTICAL)


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["F64", "F32", "BF16"])
def test_conversion_on_the_way(models: Models, tmp_path: Path, stored: str, dtype: str) -> None:
    toys = Toys(models)
    (feature,) = [feature for feature in FEATURES if feature.name == "Several DoRA adapters"]
    entry = feature.entries[2]
    base = toys.base("layers", "F32" if stored == "F64" else stored)
    if stored == "F64":
        wide = {n: tensor(v.float64(), "F64") for n, v in read_checkpoint(base).items()}
        base = tmp_path / "base"
        base.mkdir()
        write_checkpoint(base, wide)
    adapters = make_adapters(toys, feature, entry, "F32")
    lorafast.merge(base, adapters, tmp_path / "cpu", dtype=dtype)
    lorafast.merge(base, adapters, tmp_path / "out", dtype=dtype, device="torch:cpu")
    ours, cpu = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "cpu")
    terms = merge_float64(
        read_checkpoint(base), adapters, transposed=is_transposed("layers", entry.configs[0])
    )
    assert_merged_like_float64(ours, terms, identical=IDENTICAL)
    assert_like_the_cpu(ours, cpu, terms)
    assert_rest_untouched(ours, cpu, terms)
