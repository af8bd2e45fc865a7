"""Merges by products of factors in parts of bfloat16, which AMX makes where it is."""

from __future__ import annotations

from pathlib import Path

import lorafast
import numpy as np
import pytest
from numpy.typing import NDArray
from support.files import narrow, read_checkpoint, snapshot, tensor, widen
from support.handmade import adapter_tensors, make_adapter, make_base, write_checkpoint
from support.reference import PREFIX, read_updates

MODULES = {"model.layers.0.mlp.up_proj": (90, 400), "model.layers.0.mlp.down_proj": (400, 90)}
RANK = 16
here = pytest.mark.skipif(not lorafast.build_info()["amx"], reason="this processor has no AMX")
elsewhere = pytest.mark.skipif(lorafast.build_info()["amx"], reason="this processor has AMX")


@pytest.fixture(params=["BF16", "F16"])
def inputs(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    base = make_base(tmp_path / "base", modules=MODULES, dtype=request.param)
    tensors = adapter_tensors(MODULES, rank=RANK)
    return base, make_adapter(tmp_path / "adapter", tensors, r=RANK, lora_alpha=8)


def parts(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first = widen("BF16", narrow(values, "BF16")).reshape(values.shape)
    return first, widen("BF16", narrow(values - first, "BF16")).reshape(values.shape)


def merge_split(base: Path, adapter: Path, output: Path, *, without: int = 0) -> int:
    """Writes what split factors give; returns how many elements are not those of the core's merge.

    `without` leaves out as many of the three products, the largest last.
    """
    lorafast.merge(base, adapter, output, report=False)
    merged = read_checkpoint(output)
    different = 0
    for path, update in read_updates(adapter).items():
        name = f"{path.removeprefix(PREFIX)}.weight"
        weight = read_checkpoint(base)[name]
        (b, b_rest), (a, a_rest) = parts(update.scale * update.b), parts(update.a)
        products = [b_rest @ a, b @ a_rest, b @ a][without:]
        values = widen(weight.dtype, weight.data).reshape(weight.shape)
        split = tensor(values + sum(products), weight.dtype)
        pair = [np.frombuffer(value.data, "<u2") for value in (split, merged[name])]
        different += int((pair[0] != pair[1]).sum())
        merged[name] = split
    for file in output.glob("*.safetensors*"):
        file.unlink()
    write_checkpoint(output, merged)
    return different


def test_what_split_products_are_off_passes_where_it_is_said(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    output = tmp_path / "out"
    assert merge_split(base, adapter, output) > 0
    assert not lorafast.verify(base, adapter, output).ok
    assert lorafast.verify(base, adapter, output, device="cpu:amx").ok


def test_a_product_that_is_left_out_does_not_pass(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    output = tmp_path / "out"
    merge_split(base, adapter, output, without=1)
    found = lorafast.verify(base, adapter, output, device="cpu:amx")
    assert len(found.problems) == len(MODULES)


def test_other_types_are_held_to_the_same_bound(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", modules=MODULES, dtype="F32")
    tensors = adapter_tensors(MODULES, rank=RANK)
    adapter = make_adapter(tmp_path / "adapter", tensors, r=RANK, lora_alpha=8)
    merge_split(base, adapter, tmp_path / "out")
    found = lorafast.verify(base, adapter, tmp_path / "out", device="cpu:amx")
    assert len(found.problems) == len(MODULES)


@elsewhere
def test_without_amx_it_is_refused_before_anything_is_written(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(lorafast.DeviceError, match=r"no AMX .* use device='cpu'"):
        lorafast.merge(*inputs, tmp_path / "out", device="cpu:amx")
    assert not (tmp_path / "out").exists()


def test_it_is_no_device_for_analyses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown device 'cpu:amx'"):
        lorafast.scan(tmp_path, device="cpu:amx")
    with pytest.raises(ValueError, match=r"there are cpu, .*, cpu:amx"):
        lorafast.merge(tmp_path, tmp_path, tmp_path / "out", device="amx")


@here
def test_a_merge_is_proved_and_the_threads_do_not_matter(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    written = []
    for threads in (1, 2):
        output = tmp_path / f"out-{threads}"
        report = lorafast.merge(
            *inputs, output, device="cpu:amx", threads=threads, verify=True, report=False
        )
        assert report.instruction_set == "amx"
        assert report.device == "cpu:amx"
        written.append(snapshot(output))
    assert written[0] == written[1]
