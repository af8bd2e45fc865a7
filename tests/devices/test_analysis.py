"""Spectra and products through torch, against the core and against dense float64."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
import torch
from lorafast._cli.main import main
from lorafast._io import device_names
from lorafast._torch import gram, spectra
from support.analysis import graded_factors, random_factors, write_factors
from support.similarity import dense_matrix, fleet, to_cosines
from support.simulated_cuda import opened

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
DEVICES = ["torch:cpu", "simulated", pytest.param("cuda", marks=[pytest.mark.cuda, NO_CUDA])]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with opened(request.param) as name:
        yield name


devices = pytest.mark.parametrize("device", DEVICES, indirect=True)


# Products


@devices
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("bound", [None, pytest.param(1 << 20, marks=pytest.mark.exhaustive)])
def test_products_are_those_of_dense_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, precision: Any, bound: Any
) -> None:
    if bound is not None:
        # So small that every run is of a member or two.
        monkeypatch.setattr(gram, "TILE_RANKS", 6)
        monkeypatch.setattr(device_names, "parse_memory", lambda *arguments: 20_000)
    expected = dense_matrix(fleet(tmp_path / "fleet"))
    options: dict[str, Any] = {"precision": precision, "device": device, "device_memory": bound}
    found = lorafast.similarity(tmp_path / "fleet", metric="inner_product", **options)
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    tolerance = 1e-13 if precision == "float64" else 1e-6
    assert (np.abs(found.matrix - expected) <= tolerance * scale).all()
    assert np.array_equal(found.matrix, found.matrix.T)
    assert np.allclose(found.norms**2, expected.diagonal(), rtol=tolerance)
    cosines = lorafast.similarity(tmp_path / "fleet", **options)
    assert np.abs(cosines.matrix - to_cosines(expected)).max() <= tolerance
    assert (cosines.matrix.diagonal() == 1).all()


@devices
def test_modules_and_groups_are_the_cores(tmp_path: Path, device: str) -> None:
    fleet(tmp_path / "fleet")
    factors = random_factors({"other": (12, 10, 3)}, seed=5)
    write_factors(tmp_path / "fleet" / "stranger", factors, base_model_name_or_path="another")
    ours = lorafast.similarity(
        tmp_path / "fleet", per_module=True, group_by_base=True, device=device
    )
    core = lorafast.similarity(tmp_path / "fleet", per_module=True, group_by_base=True)
    assert ours.groups == core.groups
    assert np.allclose(ours.matrix, core.matrix, atol=1e-13, equal_nan=True)
    assert np.isnan(ours.matrix).any()
    assert ours.per_module is not None
    assert core.per_module is not None
    for name, table in core.per_module.items():
        assert np.allclose(ours.per_module[name], table, atol=1e-13, equal_nan=True)
    assert ours.notes == core.notes


@devices
def test_extreme_and_odd_adapters(tmp_path: Path, device: str) -> None:
    shape = {"m": (20, 16, 4)}
    factors = random_factors(shape, seed=1)["m"]
    b, a = factors
    write_factors(tmp_path / "f" / "plain", {"m": (b, a)}, dtype="F32")
    write_factors(tmp_path / "f" / "large", {"m": (b * 1e30, a * 1e-25)}, dtype="F32")
    write_factors(tmp_path / "f" / "zero", {"m": (b * 0, a)}, dtype="F32")
    odd = b.copy()
    odd[3, 2] = np.nan
    write_factors(tmp_path / "f" / "odd", {"m": (odd, a)}, dtype="F32")
    for precision in ("float64", "float32"):
        ours = lorafast.similarity(tmp_path / "f", precision=precision, device=device)
        core = lorafast.similarity(tmp_path / "f", precision=precision)
        assert ours.names == core.names
        assert np.allclose(ours.matrix, core.matrix, atol=1e-6, equal_nan=True)
        assert ours.notes == core.notes


# Spectra


def assert_same_fleet(ours: lorafast.Fleet, core: lorafast.Fleet, tolerance: float) -> None:
    for mine, theirs in ((ours.modules, core.modules), (ours.adapters, core.adapters)):
        assert list(mine) == list(theirs)
        for name in theirs:
            left, right = mine[name], theirs[name]
            if name == "singular_values":
                assert [len(own) for own in left] == [len(own) for own in right]
                left, right = (np.concatenate(list(side)) for side in (left, right))
                assert np.allclose(left, right, rtol=1e-6, atol=1e-12, equal_nan=True)
            elif isinstance(right, np.ndarray) and right.dtype.kind == "f":
                # The last of the singular values that are zero but for rounding.
                loose = name in {"condition", "entry_mean"}
                assert np.allclose(
                    left, right, rtol=1e-3 if loose else tolerance, atol=1e-12, equal_nan=True
                ), name
            else:
                assert list(left) == list(right), name
    kinds = [(finding.adapter, finding.finding.kind) for finding in core.findings]
    assert [(finding.adapter, finding.finding.kind) for finding in ours.findings] == kinds
    assert [error.path for error in ours.errors] == [error.path for error in core.errors]


@devices
@pytest.mark.parametrize("metrics", ["full", "spectra"])
def test_a_scan_finds_what_the_core_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, metrics: Any
) -> None:
    monkeypatch.setattr(spectra, "BATCH_BYTES", 20_000)
    fleet(tmp_path / "fleet")
    wide = random_factors({"wide": (6, 40, 9), "tall": (40, 6, 9)}, seed=3)
    write_factors(tmp_path / "fleet" / "wide", wide, dtype="F32")
    b, a = random_factors({"m": (20, 16, 4)}, seed=1)["m"]
    write_factors(tmp_path / "fleet" / "zero", {"m": (b * 0, a), "n": (b, a)}, dtype="F32")
    odd = b.copy()
    odd[3, 2] = np.inf
    write_factors(tmp_path / "fleet" / "odd", {"m": (odd, a), "n": (b, a)}, dtype="F32")
    broken = write_factors(tmp_path / "fleet" / "broken", {"m": (b, a)}, dtype="F32")
    (broken / "adapter_model.safetensors").write_bytes(b"no file")
    core = lorafast.scan(tmp_path / "fleet", metrics=metrics)
    ours = lorafast.scan(tmp_path / "fleet", metrics=metrics, device=device)
    assert len(core.errors) == 1
    assert_same_fleet(ours, core, 1e-9)


@devices
def test_small_singular_values_keep_their_digits(tmp_path: Path, device: str) -> None:
    sigma = np.logspace(0, -7, 8)
    factors = graded_factors(60, 50, sigma, seed=2)
    write_factors(tmp_path / "graded", {"m": factors}, dtype="F64", alpha=8)
    found = lorafast.scan(tmp_path / "graded", device=device)
    values = np.asarray(found.modules["singular_values"][0])
    assert np.allclose(values, sigma, rtol=1e-7)
    assert found.modules["numerical_rank"][0] == 8


def test_levels_without_spectra_need_no_device_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError("nothing to decompose")

    monkeypatch.setattr(spectra, "with_spectra", fail)
    fleet(tmp_path / "fleet", count=2)
    for metrics in ("headers", "moments"):
        ours = lorafast.scan(tmp_path / "fleet", metrics=metrics, device="torch:cpu")
        assert len(ours) == 2


# What goes wrong


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda(tmp_path: Path) -> None:
    fleet(tmp_path / "fleet", count=2)
    for run in (lorafast.scan, lorafast.similarity):
        with pytest.raises(lorafast.DeviceError, match=r"sees no device|without CUDA"):
            run(tmp_path / "fleet", device="cuda")
        with pytest.raises(ValueError, match="unknown device"):
            run(tmp_path / "fleet", device="tpu")
        run(tmp_path / "fleet", device="auto", cache=tmp_path / "cache")


def test_a_cache_is_of_one_backend(tmp_path: Path) -> None:
    fleet(tmp_path / "fleet", count=2)
    for run in (lorafast.scan, lorafast.similarity):
        with pytest.raises(ValueError, match="cache"):
            run(tmp_path / "fleet", device="torch:cpu", cache=tmp_path / "cache")


def test_the_commands_take_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet(tmp_path / "fleet", count=3)
    folder = str(tmp_path / "fleet")
    assert main(["similarity", folder, "--device", "torch:cpu", "--json", "--quiet"]) == 0
    assert len(json.loads(capsys.readouterr().out)["names"]) == 3
    assert main(["scan", folder, "--device", "torch:cpu", "--json", "--quiet"]) == 0
    json.loads(capsys.readouterr().out)
    assert main(["scan", folder, "--device", "tpu"]) == 2
