"""A fleet's tables in NumPy, in Arrow's libraries and in pickles."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast import _core
from lorafast._fleet.table import TABLES, Table
from support.files import tensor, write_safetensors
from support.handmade import adapter_tensors, make_adapter


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> lorafast.Fleet:
    """Texts that are not ASCII or not there, modules outside of blocks, adapters without any."""
    root = tmp_path_factory.mktemp("fleet")
    modules = {"model.layers.0.qüery": (12, 8), "model.layers.1.up": (8, 12), "head": (8, 8)}
    make_adapter(root / "größe-😀", adapter_tensors(modules, rank=4), r=4)
    make_adapter(root / "plain", adapter_tensors(modules, rank=2), r=2, lora_alpha=900)
    bare = make_adapter(root / "none", base_model_name_or_path=None, modules_to_save=["head"])
    saved = {"base_model.model.head.weight": tensor(np.ones((3, 3)), "F32")}
    write_safetensors(bare / "adapter_model.safetensors", saved)
    make_adapter(root / "broken-ß", peft_type="OFT")
    return lorafast.scan(root)


def plain(table: Table) -> dict[str, list[Any]]:
    """Columns as Python's objects, as Arrow has them."""
    columns = {}
    for name in table:
        values = table[name].tolist()
        columns[name] = [v.tolist() if isinstance(v, np.ndarray) else v for v in values]
        if name == "block":
            columns[name] = [None if block == -1 else block for block in values]
    return columns


@pytest.mark.parametrize("name", TABLES)
def test_libraries_take_the_tables_through_the_stream(fleet: lorafast.Fleet, name: Any) -> None:
    import pandas
    import polars
    import pyarrow

    table = fleet.table(name)
    expected = repr(plain(table))
    taken = pyarrow.table(table)
    taken.validate(full=True)
    assert repr(taken.to_pydict()) == expected
    assert repr(polars.DataFrame(table).to_dict(as_series=False)) == expected
    if hasattr(pandas.DataFrame, "from_arrow"):
        assert list(pandas.DataFrame.from_arrow(table).columns) == list(table)
    reader = pyarrow.RecordBatchReader.from_stream(table)
    assert reader.schema == taken.schema
    assert sum(batch.num_rows for batch in reader) == table.rows
    # Each stream is a new one.
    assert repr(pyarrow.table(table).to_pydict()) == expected


def test_numbers_are_not_copied(fleet: lorafast.Fleet) -> None:
    import pyarrow

    column = fleet.modules["frobenius_norm"]
    taken = pyarrow.table(fleet.modules)["frobenius_norm"].chunk(0)
    assert taken.buffers()[1].address == column.__array_interface__["data"][0]
    again = fleet.modules["frobenius_norm"]
    assert again.__array_interface__["data"] == column.__array_interface__["data"]
    with pytest.raises(ValueError, match="read-only"):
        column[0] = 1.0
    values, offsets = fleet.modules.flat("singular_values")
    lists = pyarrow.table(fleet.modules)["singular_values"].chunk(0)
    assert lists.values.buffers()[1].address == values.__array_interface__["data"][0]
    ranks = fleet.modules["rank"].tolist()
    assert offsets.tolist() == [sum(ranks[:row]) for row in range(7)]


def test_columns_outlive_their_table(tmp_path: Path) -> None:
    make_adapter(tmp_path / "a", adapter_tensors(rank=4), r=4)
    fleet = lorafast.scan(tmp_path)
    norms, expected = fleet.modules["frobenius_norm"], fleet.modules["frobenius_norm"].tolist()
    stream = fleet.modules.__arrow_c_stream__()
    del fleet
    lorafast.scan(tmp_path)
    assert norms.tolist() == expected
    # One that nobody takes is given back.
    del stream


@pytest.mark.parametrize("name", TABLES)
def test_slices_of_what_was_taken_are_slices_of_the_columns(
    fleet: lorafast.Fleet, name: Any
) -> None:
    import polars
    import pyarrow

    table = fleet.table(name)
    columns = plain(table)
    for start, length in ((0, 0), (1, 1), (1, 5), (2, 0), (table.rows, 3)):
        expected = repr({key: own[start : start + length] for key, own in columns.items()})
        for sliced in (
            pyarrow.table(table).slice(start, length).to_pydict(),
            polars.DataFrame(table).slice(start, length).to_dict(as_series=False),
        ):
            assert repr(sliced) == expected


def test_empty_tables_have_the_columns_of_others(fleet: lorafast.Fleet, tmp_path: Path) -> None:
    import pyarrow

    make_adapter(tmp_path / "other", peft_type="OFT")
    empty = lorafast.scan(tmp_path)
    for name in TABLES:
        one, another = empty.table(name), fleet.table(name)
        assert list(one) == list(another)
        assert pyarrow.table(one).schema == pyarrow.table(another).schema
        for column in one:
            assert len(one[column]) == 0
            assert one[column].dtype == another[column].dtype
        assert empty.to_pandas(name).shape == (0, len(one))
        assert empty.to_polars(name).shape == (0, len(one))
    assert list(pickle.loads(pickle.dumps(empty)).modules) == list(empty.modules)


def test_what_is_not_there_is_none_or_null(fleet: lorafast.Fleet) -> None:
    import pyarrow

    rows = dict(zip(fleet.names, fleet.adapters["base"].tolist(), strict=True))
    assert rows["none"] is None
    assert pyarrow.table(fleet.adapters)["base"].null_count == 1
    assert fleet.adapters["rank"].tolist()[fleet.names.index("none")] == -1
    blocks = fleet.modules["block"]
    assert sorted(blocks.tolist()) == [-1, -1, 0, 0, 1, 1]
    assert pyarrow.table(fleet.modules)["block"].null_count == 2
    codes, texts = fleet.findings.table.coded("module")
    assert (codes == -1).any()
    assert [texts[code] if code >= 0 else None for code in codes.tolist()] == (
        fleet.findings.table["module"].tolist()
    )


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_fleet_comes_back_from_a_pickle(fleet: lorafast.Fleet, protocol: int) -> None:
    import pyarrow

    again = pickle.loads(pickle.dumps(fleet, protocol))
    assert again.findings == fleet.findings
    assert again.errors == fleet.errors
    assert (again.names, again.paths, again.metrics) == (fleet.names, fleet.paths, fleet.metrics)
    for name in TABLES:
        one, another = again.table(name), fleet.table(name)
        assert repr(plain(one)) == repr(plain(another))
        taken = pyarrow.table(one)
        taken.validate(full=True)
        assert repr(taken.to_pydict()) == repr(pyarrow.table(another).to_pydict())
        assert taken.schema.equals(pyarrow.table(another).schema, check_metadata=True)


def test_a_pickle_of_parts_that_do_not_fit_is_refused(fleet: lorafast.Fleet) -> None:
    restore, (metadata, columns) = fleet.modules._core.__reduce__()
    assert restore(metadata, columns).rows == fleet.modules.rows
    for column in ("rank", "module", "block", "singular_values"):
        place = fleet.modules._core.names.index(column)
        name, (kind, length, nulls, buffers, children) = columns[place]
        for changed in (
            (kind, length + 99, nulls, buffers, children),
            (kind, length, b"", buffers, children),
            (kind, length, nulls, [own[:4] for own in buffers], children),
            ("decimal", length, nulls, buffers, children),
            (kind, length, nulls, [], children),
        ):
            others = [*columns[:place], (name, changed), *columns[place + 1 :]]
            with pytest.raises(ValueError):  # noqa: PT011 (Arrow's words)
                restore(metadata, others)
    name, (kind, length, nulls, _, children) = columns[fleet.modules._core.names.index("module")]
    beyond = (kind, length, nulls, [np.full(length, 99, np.int32).tobytes()], children)
    with pytest.raises(ValueError):  # noqa: PT011 (Arrow's words)
        restore(metadata, [(name, beyond)])


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
def test_paths_that_are_no_utf8_stay_what_they_are(tmp_path: Path) -> None:
    import polars
    import pyarrow

    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff"))
    broken = Path(os.fsdecode(os.fsencode(tmp_path) + b"/c\xff"))
    make_adapter(tmp_path / "a")
    make_adapter(odd)
    make_adapter(broken, peft_type="OFT")
    fleet = lorafast.scan(tmp_path)
    for own in (fleet, pickle.loads(pickle.dumps(fleet))):
        assert own.paths == [tmp_path / "a", odd]
        assert own.adapters["path"].tolist() == [str(tmp_path / "a"), str(odd)]
        assert [error.path for error in own.errors] == [broken]
        assert own.names == ["a", "b\\udcff"]
    for paths in (
        pyarrow.table(fleet.adapters)["path"].to_pylist(),
        polars.DataFrame(fleet.adapters)["path"].to_list(),
    ):
        assert paths == [f"{tmp_path}/a", f"{tmp_path}/b\\udcff"]


WITHOUT_ARROW = """
import sys
sys.modules["pyarrow"] = sys.modules["pandas"] = sys.modules["polars"] = None
import lorafast
fleet = lorafast.scan(sys.argv[1])
print(fleet.modules["frobenius_norm"].dtype, fleet.adapters["name"].tolist())
print(type(fleet.modules.__arrow_c_stream__()).__name__)
"""


def test_numpy_is_all_that_a_scan_needs(tmp_path: Path) -> None:
    make_adapter(tmp_path / "a")
    command = [sys.executable, "-c", WITHOUT_ARROW, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:2] == ["float64 ['a']", "PyCapsule"]


def test_a_table_is_used_as_a_mapping(fleet: lorafast.Fleet) -> None:
    table = fleet.adapters
    assert table.keys() == set(table) == dict(table).keys()
    assert table.keys() >= {"rank"}
    assert [name for name, _ in table.items()] == list(table)
    for column, (name, own) in zip(table.values(), table.items(), strict=True):
        assert len(column) == len(own) == len(table[name]) == table.rows
    assert table.get("nothing") is None
    assert table.get("rank", 3).tolist() == table["rank"].tolist()
    assert len(table) == len(list(table))
    assert table.nbytes > 8 * table.rows


def test_rows_and_columns_that_are_not_there(fleet: lorafast.Fleet) -> None:
    with pytest.raises(KeyError):
        fleet.modules["nothing"]
    with pytest.raises(KeyError):
        fleet.modules.coded("nothing")
    assert "nothing" not in fleet.modules
    with pytest.raises(IndexError):
        fleet.modules.row(fleet.modules.rows)
    assert fleet.modules.row(0)["module"] == fleet.modules["module"][0]
    assert repr(fleet.findings.table).startswith(f"Table({len(fleet.findings)} rows: adapter, ")
    tables = _core.FleetTables("headers", 1)
    found: list[Any] = []
    _core.scan_adapters(
        [fleet.paths[0]],
        metrics="moments",
        threads=1,
        receive=lambda batch, *_: found.extend(batch),
    )
    with pytest.raises(ValueError, match="another level"):
        tables.add(0, found[0][1], [])


def test_metrics_are_told_once(fleet: lorafast.Fleet) -> None:
    analysis = lorafast.analyze(fleet.paths[0])
    module = next(iter(analysis.modules.values()))
    names = [metric["name"] for metric in _core.module_metrics()]
    assert len(set(names)) == len(names) > 10
    for metric in _core.module_metrics():
        value = getattr(module, metric["name"])
        assert isinstance(value, int if metric["integer"] else float)
        assert fleet.modules[metric["name"]].dtype == (
            np.int64 if metric["integer"] else np.float64
        )
        assert metric["symbol"] in analysis.to_html()
        assert metric["doc"]
        assert metric["name"] in (type(module).__doc__ or "")
