"""A fleet's tables as mappings, data frames and files."""

from __future__ import annotations

import json
from pathlib import Path

import lorafast
import numpy as np
import pytest
from support.fleets import make_fleet
from support.handmade import MODULES, adapter_config, adapter_tensors, make_adapter


def test_data_frames_hold_the_tables(tmp_path: Path) -> None:
    import polars
    import pyarrow

    make_fleet(tmp_path)
    make_adapter(
        tmp_path / "outside",
        adapter_tensors({"score": (8, 8)}),
        base_model_name_or_path=None,
    )
    fleet = lorafast.scan(tmp_path)
    for name in ("adapters", "modules"):
        table = fleet.table(name)
        arrow, pandas_, polars_ = (
            fleet.to_arrow(name),
            fleet.to_pandas(name),
            fleet.to_polars(name),
        )
        assert arrow.column_names == list(pandas_.columns) == polars_.columns == list(table)
        for column in table:
            values = table[column].tolist()
            expected = [v.tolist() if isinstance(v, np.ndarray) else v for v in values]
            if column == "block":
                expected = [None if block < 0 else block for block in expected]
                assert pandas_[column].isna().sum() == 1
            elif column != "base":
                plain = [
                    v.tolist() if isinstance(v, np.ndarray) else v for v in pandas_[column].tolist()
                ]
                assert repr(plain) == repr(expected)
            assert repr(arrow[column].to_pylist()) == repr(expected), column
            assert repr(polars_[column].to_list()) == repr(expected), column
    assert arrow.schema.metadata[b"lorafast.schema_version"] == b"2"
    taken = polars.DataFrame(fleet)
    assert repr(taken["frobenius_norm"].to_list()) == repr(
        fleet.adapters["frobenius_norm"].tolist()
    )
    assert pyarrow.table(fleet).num_rows == 7
    with pytest.raises(ValueError, match="table must be"):
        fleet.to_arrow("tensors")  # type: ignore[arg-type]  # wrong on purpose


def test_parquet_files_hold_the_tables_and_the_errors(tmp_path: Path) -> None:
    import pyarrow.parquet

    make_fleet(tmp_path / "fleet")
    make_adapter(tmp_path / "fleet" / "other", peft_type="OFT")
    fleet = lorafast.scan(tmp_path / "fleet")
    files = fleet.to_parquet(tmp_path / "out" / "deep")
    assert sorted(file.name for file in files) == sorted(
        file.name for file in (tmp_path / "out" / "deep").iterdir()
    )
    for name in ("adapters", "modules"):
        file = tmp_path / "out" / "deep" / f"{name}.parquet"
        read = pyarrow.parquet.read_table(file)
        assert repr(read.to_pylist()) == repr(fleet.to_arrow(name).to_pylist())
        assert read.schema.metadata[b"lorafast.schema_version"] == b"2"
        group = pyarrow.parquet.ParquetFile(file).metadata.row_group(0)
        assert {group.column(i).compression for i in range(group.num_columns)} == {"ZSTD"}
    errors = json.loads((tmp_path / "out" / "deep" / "errors.json").read_text())["errors"]
    assert [error["path"] for error in errors] == [str(tmp_path / "fleet" / "other")]
    (tmp_path / "file").write_text("")
    with pytest.raises(lorafast.OutputError, match="cannot be written"):
        fleet.to_parquet(tmp_path / "file")


def test_a_table_is_a_mapping_of_arrays(tmp_path: Path) -> None:
    make_fleet(tmp_path)
    fleet = lorafast.scan(tmp_path)
    assert isinstance(fleet.modules["frobenius_norm"], np.ndarray)
    assert fleet.modules["rank"].dtype == np.int64
    assert fleet.modules["adapter"].dtype == object
    assert len(fleet.adapters["name"]) == fleet.adapters.rows == len(fleet) == 6
    assert "rank" in fleet.modules
    with pytest.raises(KeyError):
        fleet.modules["nothing"]
    assert repr(fleet) == "<Fleet 6 adapters, 24 modules>"
    assert next(iter(MODULES)) in fleet.modules["module"]
    assert adapter_config()["r"] == 4
