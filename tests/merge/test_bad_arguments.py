"""Arguments outside their domain, outputs that cannot be written, results that are not finite."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import (
    encode,
    layout,
    read_checkpoint,
    read_safetensors,
    snapshot,
    tensor,
    write_safetensors,
)
from support.handmade import adapter_tensors, make_adapter, make_base
from support.refusal import make_previous, refuses

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter")


# Arguments


ARGUMENTS: list[tuple[int, dict[str, Any], list[str]]] = [
    (2, {"strategy": "weighted", "weights": [1.0]}, ["weights", "1", "2"]),
    (1, {"strategy": "weighted", "weights": [1.0, 0.5]}, ["weights", "1", "2"]),
    (1, {"strategy": "weighted", "weights": []}, ["weights"]),
    (2, {"strategy": "weighted", "weights": [1.0, float("nan")]}, ["weight", "nan"]),
    (2, {"strategy": "weighted", "weights": [float("inf"), 1.0]}, ["weight", "inf"]),
    (2, {"strategy": "sequential", "weights": [0.5, 0.5]}, ["weights", "weighted"]),
    (2, {"strategy": "average", "weights": [0.5, 0.5]}, ["weights", "weighted"]),
    (1, {"strategy": "median"}, ["median", "sequential", "weighted", "average"]),
    (1, {"strategy": ""}, ["sequential", "weighted", "average"]),
    (1, {"dtype": "int8"}, ["int8", "bfloat16"]),
    (1, {"dtype": "BF17"}, ["BF17", "bfloat16"]),
    (0, {}, ["adapter"]),
]


@pytest.mark.parametrize("case", ARGUMENTS, ids=str)
def test_a_wrong_argument(
    tmp_path: Path, base: Path, adapter: Path, case: tuple[int, dict[str, Any], list[str]]
) -> None:
    count, options, says = case
    refuses(tmp_path, ValueError, base, [adapter] * count, *says, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"device": "abacus"},
        {"threads": 0},
        {"threads": -1},
    ],
    ids=str,
)
def test_a_wrong_way_of_running(
    tmp_path: Path, base: Path, adapter: Path, options: dict[str, Any]
) -> None:
    (name,) = options
    refuses(tmp_path, ValueError, base, adapter, name, planned=False, **options)


# Outputs


def output_is_refused(
    folder: Path, output: Path, *says: str, base: Path, adapter: Path, overwrite: bool
) -> None:
    before = snapshot(folder)
    with pytest.raises(lorafast.OutputError) as refused:
        lorafast.merge(base, adapter, output, overwrite=overwrite)
    assert snapshot(folder) == before
    for text in says:
        assert text in str(refused.value)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", [".", "merged", "a/b/c", "../base", "../base/../base/x"])
def test_the_output_is_the_base_or_inside_it(
    tmp_path: Path, base: Path, adapter: Path, where: str, overwrite: bool
) -> None:
    output = base / where
    output_is_refused(tmp_path, output, "base", base=base, adapter=adapter, overwrite=overwrite)


def test_the_output_is_the_base_through_a_link(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "link").symlink_to(base)
    for output in (tmp_path / "link", tmp_path / "link" / "merged"):
        output_is_refused(tmp_path, output, base=base, adapter=adapter, overwrite=True)


def test_the_base_through_a_link_is_the_output(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "link").symlink_to(base)
    output_is_refused(tmp_path, base, base=tmp_path / "link", adapter=adapter, overwrite=True)


def test_an_output_that_holds_the_base_does_it_no_harm(tmp_path: Path, adapter: Path) -> None:
    """Overwriting replaces a model, not everything that lies in its folder."""
    folder = tmp_path / "models"
    base = make_base(folder / "base", shards=2)
    before = snapshot(base)
    lorafast.merge(base, adapter, folder, overwrite=True)
    assert snapshot(base) == before
    assert read_checkpoint(folder).keys() == read_checkpoint(base).keys()


def test_overwriting_keeps_what_is_no_model(tmp_path: Path, base: Path, adapter: Path) -> None:
    output = tmp_path / "out"
    make_previous(output)
    lorafast.merge(base, adapter, output, overwrite=True)
    assert (output / "notes.txt").read_bytes() == b"mine"
    assert read_checkpoint(output).keys() == read_checkpoint(base).keys()


def test_the_output_is_the_adapter(tmp_path: Path, base: Path, adapter: Path) -> None:
    output_is_refused(tmp_path, adapter, base=base, adapter=adapter, overwrite=True)


def test_a_single_file_base_is_not_written_over(tmp_path: Path, base: Path, adapter: Path) -> None:
    before = snapshot(base)
    with pytest.raises(lorafast.OutputError):
        lorafast.merge(base / "model.safetensors", adapter, base, overwrite=True)
    assert snapshot(base) == before


def test_the_output_exists(tmp_path: Path, base: Path, adapter: Path) -> None:
    output = tmp_path / "out"
    make_previous(output)
    output_is_refused(
        tmp_path, output, str(output), "overwrit", base=base, adapter=adapter, overwrite=False
    )


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_output_is_a_file(tmp_path: Path, base: Path, adapter: Path, overwrite: bool) -> None:
    output = tmp_path / "out"
    output.write_text("mine")
    output_is_refused(
        tmp_path, output, str(output), base=base, adapter=adapter, overwrite=overwrite
    )


def test_the_output_is_below_a_file(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises((lorafast.OutputError, NotADirectoryError)):
        lorafast.merge(base, adapter, tmp_path / "file" / "out")
    assert snapshot(tmp_path) == before


def test_an_empty_output_is_used(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "out").mkdir()
    lorafast.merge(base, adapter, tmp_path / "out")
    assert read_checkpoint(tmp_path / "out").keys() == read_checkpoint(base).keys()


def test_folders_above_the_output_are_made(tmp_path: Path, base: Path, adapter: Path) -> None:
    lorafast.merge(base, adapter, tmp_path / "a" / "b" / "out")
    assert read_checkpoint(tmp_path / "a" / "b" / "out").keys() == read_checkpoint(base).keys()


def test_overwriting_leaves_no_shard_of_the_earlier_model(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    output = tmp_path / "out"
    sharded = make_base(tmp_path / "sharded", shards=3)
    lorafast.merge(sharded, adapter, output)
    lorafast.merge(base, adapter, output, overwrite=True)
    assert [p.name for p in output.glob("*.safetensors*")] == ["model.safetensors"]
    lorafast.merge(sharded, adapter, output, overwrite=True)
    assert len(list(output.glob("*.safetensors*"))) == 4
    assert read_checkpoint(output).keys() == read_checkpoint(base).keys()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_without_permission(tmp_path: Path, base: Path, adapter: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises((lorafast.OutputError, PermissionError), match="locked"):
        lorafast.merge(base, adapter, locked / "out")


def test_too_little_space(tmp_path: Path, base: Path, adapter: Path) -> None:
    """A base with a hole in it that is larger than what the disk has left."""
    file = base / "model.safetensors"
    header, body = layout(read_safetensors(file))
    rows = (shutil.disk_usage(tmp_path).free + 2**40) // 2**20
    header["huge"] = {
        "dtype": "U8",
        "shape": [rows, 2**20],
        "data_offsets": [len(body), len(body) + rows * 2**20],
    }
    file.write_bytes(encode(json.dumps(header), body))
    try:
        os.truncate(file, file.stat().st_size + rows * 2**20)
    except OSError:
        pytest.skip("this file system holds no file so large")
    # Not through `refuses`: no copy of this file could be hashed.
    before = snapshot(tmp_path)
    with pytest.raises(lorafast.OutputError, match=r"(?i)\b(free|space)\b"):
        lorafast.merge(base, adapter, tmp_path / "out")
    assert snapshot(tmp_path) == before


# Results


def overflowing(folder: Path, dtype: str, top: float) -> tuple[Path, Path]:
    """A base with one weight near its dtype's top, and an adapter that pushes it over."""
    base = make_base(folder / "large", dtype=dtype)
    file = base / "model.safetensors"
    tensors = read_safetensors(file)
    values = tensors[Q_PROJ].float64()
    values[17, 3] = top
    write_safetensors(file, tensors | {Q_PROJ: tensor(values, dtype)})
    factors = adapter_tensors()
    prefix = f"base_model.model.{Q_PROJ.removesuffix('.weight')}"
    a, b = np.zeros((4, 20)), np.zeros((24, 4))
    a[0, 3], b[0:24, 0] = 1, 0.5 * top
    factors[f"{prefix}.lora_A.weight"] = tensor(a)
    factors[f"{prefix}.lora_B.weight"] = tensor(b)
    return base, make_adapter(folder / "strong", factors, r=4, lora_alpha=4)


@pytest.mark.parametrize(("dtype", "top"), [("F16", 60000.0), ("BF16", 3e38), ("F32", 3e38)])
def test_a_result_that_is_not_finite(tmp_path: Path, dtype: str, top: float) -> None:
    base, adapter = overflowing(tmp_path, dtype, top)
    refuses(tmp_path, lorafast.NumericError, base, adapter, Q_PROJ, planned=False)


def test_a_conversion_that_is_not_finite(tmp_path: Path, base: Path, adapter: Path) -> None:
    file = base / "model.safetensors"
    large = {"model.norm.weight": tensor(np.full(20, 1e6))}
    write_safetensors(file, read_safetensors(file) | large)
    refuses(
        tmp_path,
        lorafast.NumericError,
        base,
        adapter,
        "model.norm.weight",
        planned=False,
        dtype="float16",
    )
    lorafast.merge(base, adapter, tmp_path / "out", dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_what_the_base_had_of_nan_and_infinity_stays(
    tmp_path: Path, adapter: Path, dtype: str
) -> None:
    base = make_base(tmp_path / "odd", dtype=dtype)
    file = base / "model.safetensors"
    tensors = read_safetensors(file)
    values = tensors[Q_PROJ].float64()
    values[0, 0], values[5, 7], values[23, 19] = np.nan, np.inf, -np.inf
    write_safetensors(file, tensors | {Q_PROJ: tensor(values, dtype)})
    lorafast.merge(base, adapter, tmp_path / "out")
    merged = read_checkpoint(tmp_path / "out")[Q_PROJ].float64()
    assert np.isnan(merged[0, 0])
    assert merged[5, 7] == np.inf
    assert merged[23, 19] == -np.inf
    assert np.count_nonzero(~np.isfinite(merged)) == 3


def test_an_adapter_may_come_twice(tmp_path: Path, base: Path, adapter: Path) -> None:
    lorafast.merge(base, [adapter, adapter], tmp_path / "twice")
    lorafast.merge(base, adapter, tmp_path / "doubled", strategy="weighted", weights=[2.0])
    twice, doubled = read_checkpoint(tmp_path / "twice"), read_checkpoint(tmp_path / "doubled")
    np.testing.assert_allclose(
        twice[Q_PROJ].float64(), doubled[Q_PROJ].float64(), rtol=1e-6, atol=1e-8
    )
