"""Scanning fleets: the figures of `analyze` in tables."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import lorafast
import pytest
from support.fleets import make_fleet, tables
from support.handmade import adapter_tensors, make_adapter

FIGURES = (
    *("rank", "alpha", "scaling", "frobenius_norm", "spectral_norm", "stable_rank"),
    *("effective_rank", "energy_effective_rank", "participation_ratio", "k90", "k95", "k99"),
    *("numerical_rank", "condition", "entry_mean", "kind", "layer"),
)


STATISTICS = ("mean", "std", "min", "max", "l2_norm", "skewness", "kurtosis", "zero_share")


SUMMARY = ("frobenius_norm", "max_spectral_norm", "median_spectral_norm", "mean_effective_rank")


def assert_same_figures(fleet: lorafast.Fleet) -> None:
    """Every cell is the figure that `analyze` has, bit for bit."""
    modules = {name: fleet.modules[name] for name in fleet.modules}
    adapters = {name: fleet.adapters[name] for name in fleet.adapters}
    row = 0
    for position, (path, name) in enumerate(zip(fleet.paths, fleet.names, strict=True)):
        analysis = lorafast.analyze(path)
        assert adapters["path"][position] == str(path)
        assert adapters["name"][position] == name
        for column in SUMMARY:
            same(adapters[column][position], analysis.summary[column])
        for column in (*STATISTICS, "non_finite"):
            same(adapters[column][position], getattr(analysis.weights, column))
        assert adapters["modules"][position] == analysis.summary["modules"]
        assert adapters["parameters"][position] == analysis.summary["total_parameters"]
        assert adapters["bytes"][position] == analysis.summary["total_bytes"]
        assert adapters["base"][position] == analysis.summary["base"]
        kinds = [finding.kind for finding in analysis.findings]
        assert adapters["findings"][position] == list(dict.fromkeys(kinds))
        counts = [
            sum(finding.severity == severity for finding in analysis.findings)
            for severity in ("critical", "warning", "note")
        ]
        assert [adapters[c][position] for c in ("severe", "warnings", "notes")] == counts
        for module in analysis.modules.values():
            assert modules["adapter"][row] == name
            assert modules["module"][row] == module.path
            assert modules["block"][row] == (-1 if module.block is None else module.block)
            assert (modules["out_features"][row], modules["in_features"][row]) == module.shape
            for column in FIGURES:
                same(modules[column][row], getattr(module, column))
            assert modules["singular_values"][row].tolist() == module.singular_values or math.isnan(
                module.frobenius_norm
            )
            for side, tensor_name in (("a", module.a_name), ("b", module.b_name)):
                for column in STATISTICS:
                    expected = getattr(analysis.tensors[tensor_name], column)
                    same(modules[f"{side}_{column}"][row], expected)
            row += 1
    assert row == fleet.modules.rows


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(found)
    else:
        assert found == expected


def test_figures_are_those_of_analyze(tmp_path: Path) -> None:
    paths = make_fleet(tmp_path)
    fleet = lorafast.scan(tmp_path, threads=2)
    assert fleet.paths == paths
    assert fleet.errors == []
    assert_same_figures(fleet)
    digests = fleet.adapters["blake3"].tolist()
    assert len(set(digests)) == len(paths)
    assert {len(digest) for digest in digests} == {64}
    assert fleet.adapters["scaling_rule"][:2].tolist() == ["alpha/r", "alpha/sqrt(r)"]
    assert [len(values) for values in fleet.modules["singular_values"][:8]] == [4] * 4 + [8] * 4
    critical = [item for item in fleet.findings if item.finding.severity == "critical"]
    assert {item.adapter for item in critical} == {"a2"}
    assert fleet.findings[: len(critical)] == critical


def test_rows_have_as_many_singular_values_as_their_updates(tmp_path: Path) -> None:
    # No more than the smaller side of the weight, whatever the rank.
    make_adapter(tmp_path / "wide", adapter_tensors(rank=22), r=22)
    make_adapter(tmp_path / "narrow", adapter_tensors(rank=2), r=2)
    fleet = lorafast.scan(tmp_path)
    lengths = [len(values) for values in fleet.modules["singular_values"]]
    assert lengths == [2] * 4 + [20] * 4
    assert_same_figures(fleet)


def test_threads_do_not_change_the_tables(tmp_path: Path) -> None:
    make_fleet(tmp_path, 20)
    assert tables(lorafast.scan(tmp_path, threads=1)) == tables(lorafast.scan(tmp_path, threads=5))


@pytest.mark.real_data
def test_everything_that_others_trained(real_data: Path) -> None:
    fleet = lorafast.scan(real_data / "adapters")
    assert len(fleet) >= 4
    assert_same_figures(fleet)
    folders = {path for path in (real_data / "adapters").iterdir() if path.is_dir()}
    seen = [*fleet.paths, *(error.path for error in fleet.errors)]
    assert {folder for folder in folders if not any(folder in (p, *p.parents) for p in seen)} == (
        set()
    )
    for error in fleet.errors:
        with pytest.raises((lorafast.LorafastError, OSError)) as refused:
            lorafast.analyze(error.path)
        assert error.reason in str(refused.value)
        assert not error.reason.startswith("/")
        assert len(error.reason) > 20


@pytest.mark.parametrize("metrics", ["headers", "moments", "spectra"])
def test_levels_have_the_columns_of_the_full_one(tmp_path: Path, metrics: Any) -> None:
    make_fleet(tmp_path)
    full = lorafast.scan(tmp_path)
    less = lorafast.scan(tmp_path, metrics=metrics)
    assert less.metrics == metrics
    for name in ("adapters", "modules"):
        few, all_ = less.table(name), full.table(name)
        assert set(few) < set(all_)
        for column in set(few) - {"findings", "severe", "warnings", "notes", "blake3"}:
            assert repr(few[column].tolist()) == repr(all_[column].tolist()), column
    assert ("a_mean" in less.modules) == (metrics == "moments")
    assert ("singular_values" in less.modules) == (metrics == "spectra")
    hashes = less.adapters["blake3"].tolist()
    assert hashes == ([None] * 6 if metrics == "headers" else full.adapters["blake3"].tolist())
    assert less.bytes_read > 0


def test_adapters_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("north/final", "south/final", "south/old"):
        make_adapter(tmp_path / name)
    fleet = lorafast.scan(tmp_path)
    assert fleet.names == ["north/final", "south/final", "south/old"]
    assert set(fleet.modules["adapter"]) == set(fleet.names)


def test_pickled_adapters_are_read_and_keep_their_own_hash(tmp_path: Path) -> None:
    import torch

    for index in range(3):
        path = make_adapter(tmp_path / f"p{index}")
        weights = path / "adapter_model.safetensors"
        from safetensors.torch import load_file

        torch.save(load_file(weights), path / "adapter_model.bin")
        weights.unlink()
    make_adapter(tmp_path / "s")
    fleet = lorafast.scan(tmp_path)
    assert fleet.names == ["p0", "p1", "p2", "s"]
    assert_same_figures(fleet)
    # Of the pickle's bytes, not of the tensors in it.
    shutil.copytree(tmp_path / "p0", tmp_path / "copy")
    tensors = torch.load(tmp_path / "p0" / "adapter_model.bin", weights_only=True)
    shutil.copytree(tmp_path / "p0", tmp_path / "other")
    other = tmp_path / "other" / "adapter_model.bin"
    torch.save(tensors, other, _use_new_zipfile_serialization=False)
    again = lorafast.scan(tmp_path)
    hashes = dict(zip(again.names, again.adapters["blake3"].tolist(), strict=True))
    assert hashes["p0"] == fleet.adapters["blake3"][0] == hashes["copy"]
    assert len({hashes["p0"], hashes["other"], hashes["s"]}) == 3


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    paths = make_fleet(tmp_path)
    size = sum((path / "adapter_model.safetensors").stat().st_size for path in paths)
    told: list[tuple[int, int]] = []
    fleet = lorafast.scan(tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (size, size)
    assert fleet.bytes_read == size
