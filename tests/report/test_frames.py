"""Results as data frames: a row for each part, columns of one type, nothing nested."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import lorafast
import pytest
from lorafast._report.rows import PARTS, rows_of
from support import records
from support.fleets import make_fleet
from support.handmade import adapter_tensors, make_adapter

pandas = pytest.importorskip("pandas")
polars = pytest.importorskip("polars")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("frames")
    make_fleet(folder)
    make_adapter(folder / "copy", adapter_tensors(rank=4, seed=0))
    paths = [folder / name for name in ("a0", "a3", "copy")]
    return {
        "AdapterAnalysis": lorafast.analyze(paths[0]),
        "Comparison": lorafast.compare(paths),
        "Similarity": lorafast.similarity(folder),
        "Duplicates": lorafast.duplicates(folder),
        "Lineage": lorafast.lineage(paths[0], folder),
        "Trajectory": lorafast.trajectory(paths),
    }


#: The values that a column of each kind may have, beside NaN.
PLAIN = {"text": str, "integer": int, "float": float, "boolean": bool}


@pytest.mark.parametrize("name", PARTS)
def test_columns_are_plain_and_named_in_snake_case(results: dict[str, Any], name: str) -> None:
    result = results[name]
    pandas_frame, polars_frame = result.to_pandas(), result.to_polars()
    columns = rows_of(result).columns
    assert list(pandas_frame.columns) == list(polars_frame.columns) == list(columns)
    assert len(pandas_frame) == len(polars_frame) > 0
    for column, kind in columns.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", column)
        values = polars_frame[column].to_list()
        for value in values:
            assert type(value) is PLAIN[kind] or (value is None and kind in ("text", "integer"))
        for value, other in zip(values, pandas_frame[column].tolist(), strict=True):
            missing = bool(pandas.isna(value))
            assert bool(pandas.isna(other)) if missing else other == value
        if kind == "float":
            assert pandas_frame[column].dtype == "float64"
            assert polars_frame[column].null_count() == 0


def test_what_a_module_lacks_is_nan(results: dict[str, Any]) -> None:
    frame = results["AdapterAnalysis"].to_pandas()
    assert frame["relative_norm"].dtype == "float64"
    assert frame["relative_norm"].isna().all()
    assert results["AdapterAnalysis"].to_polars()["relative_norm"].is_nan().all()


def test_a_module_outside_of_blocks_has_no_block() -> None:
    analysis = records.analysis({**records.places(1), "lm_head": (None, "lm_head")})
    frame = analysis.to_pandas()
    assert frame["block"].dtype == "Int64"
    assert frame["block"].isna().sum() == 1
    assert analysis.to_polars()["block"].null_count() == 1


def test_pairs_of_modules_are_rows(results: dict[str, Any]) -> None:
    comparison = results["Comparison"]
    frame = comparison.to_pandas()
    assert len(frame) == 3 * len(comparison.modules)
    for row in frame.to_dict("records"):
        module = comparison.modules[row["path"]]
        i, j = comparison.names.index(row["first"]), comparison.names.index(row["second"])
        assert row["cosine"] == module.cosine[i, j]
        assert row["first_norm"] == module.norms[i]
        (pair,) = (each for each in module.pairs if (each.first, each.second) == (i, j))
        assert row["relative_difference"] == pair.relative_difference
    with pytest.raises(ValueError, match="'pairs' or 'modules', not 'adapters'"):
        comparison.to_polars("adapters")


def test_a_pair_with_a_module_of_one_alone_has_no_row() -> None:
    one, two = (records.analysis({name: (None, name)}, name=name) for name in "ab")
    comparison = records.comparison([one, two])
    assert comparison.to_pandas().shape == (0, len(rows_of(comparison).columns))
    assert comparison.to_polars().schema["cosine"] == polars.Float64
    modules = comparison.to_pandas("modules")
    assert modules["adapter"].tolist() == ["a", "b"]


def test_pairs_of_adapters_are_rows(results: dict[str, Any]) -> None:
    similarity = results["Similarity"]
    frame = similarity.to_pandas()
    count = len(similarity)
    assert len(frame) == count * (count - 1) // 2
    row = frame[(frame["first"] == "a0") & (frame["second"] == "copy")].iloc[0]
    i, j = similarity.position("a0"), similarity.position("copy")
    assert row["cosine"] == similarity.matrix[i, j]
    assert row["shared_modules"] == similarity.shared[i, j]


def test_members_of_groups_are_rows(results: dict[str, Any]) -> None:
    frame = results["Duplicates"].to_pandas()
    assert frame[frame["is_first"]]["name"].tolist() == [
        group.names[0] for group in results["Duplicates"]
    ]
    assert set(frame["tier"]) == {group.tier for group in results["Duplicates"]}


def test_candidates_and_checkpoints_are_rows(results: dict[str, Any]) -> None:
    lineage, trajectory = results["Lineage"], results["Trajectory"]
    assert lineage.to_pandas()["coefficient"].tolist() == list(lineage.coefficients.values())
    steps = trajectory.to_polars()
    assert steps["norm"].to_list() == [step.norm for step in trajectory.steps]
    assert math.isnan(steps["change"][0])
    assert steps["output_subspace_last"][0] == trajectory.steps[0].subspace_last[0]


def test_a_missing_package_is_named(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pandas", "polars"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
        for result in results.values():
            with pytest.raises(lorafast.MissingDependencyError, match=rf"lorafast\[{name}\]"):
                getattr(result, f"to_{name}")()


def test_files_of_an_odd_name_are_texts(tmp_path: Path) -> None:
    import os

    name = os.fsdecode(b"a\xff")
    try:
        make_adapter(tmp_path / name)
    except OSError:
        pytest.skip("this file system holds no such name")
    make_adapter(tmp_path / "b", adapter_tensors(seed=2))
    lineage = lorafast.lineage(tmp_path / "b", [tmp_path / name])
    lineage.to_pandas()
    lineage.to_polars()
