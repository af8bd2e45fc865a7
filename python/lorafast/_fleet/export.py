"""A fleet's tables in the forms of other libraries."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafast._errors import OutputError, missing
from lorafast._fleet.entry import SCHEMA_VERSION
from lorafast._fleet.table import NOTHING, Lists, Table, Texts
from lorafast._io import atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import BinaryIO

    import pandas
    import polars
    import pyarrow

    from lorafast._fleet.discovery import ScanError
    from lorafast._types import TableName

#: Columns of whole numbers in which -1 stands for nothing.
NULLABLE = ("block",)
#: Columns of texts of which there are few: dictionaries in Arrow.
REPEATED = ("adapter", "module", "layer", "kind", "severity")


def _encodable(text: str | None) -> str | None:
    """A text that can be UTF-8; bytes of a file's name that are none are written as escapes."""
    if text is None or text.isascii():
        return text
    return text.encode(errors="backslashreplace").decode()


def arrow_table(table: Table) -> pyarrow.Table:
    """The table in Arrow; numbers and singular values are not copied."""
    try:
        import pyarrow
    except ImportError as error:
        raise missing("pyarrow", "arrow", "make an Arrow table") from error

    def texts(name: str, column: Texts) -> Any:
        codes = pyarrow.array(column.codes, mask=column.codes == NOTHING)
        values = pyarrow.array(list(map(_encodable, column.values)), type=pyarrow.string())
        if name in REPEATED:
            return pyarrow.DictionaryArray.from_arrays(codes, values)
        return values.take(codes)

    arrays = []
    for name, column in table.stored().items():
        if isinstance(column, Texts):
            arrays.append(texts(name, column))
        elif isinstance(column, Lists):
            values = column.values
            flat = (
                pyarrow.array(list(map(_encodable, values.array())), type=pyarrow.string())
                if isinstance(values, Texts)
                else pyarrow.array(values)
            )
            arrays.append(pyarrow.LargeListArray.from_arrays(column.offsets, flat))
        else:
            mask = column == NOTHING if name in NULLABLE else None
            arrays.append(pyarrow.array(column, mask=mask))
    metadata = {"lorafast.schema_version": str(SCHEMA_VERSION)}
    made: pyarrow.Table = pyarrow.Table.from_arrays(arrays, names=list(table), metadata=metadata)
    return made


def pandas_frame(table: Table) -> pandas.DataFrame:
    """The table in pandas."""
    try:
        import pandas
    except ImportError as error:
        raise missing("pandas", "pandas", "make a DataFrame") from error
    frame = pandas.DataFrame({name: table[name] for name in table})
    for name in NULLABLE:
        if name in frame:
            frame[name] = frame[name].astype("Int64").mask(frame[name] == NOTHING)
    return frame


def polars_frame(table: Table) -> polars.DataFrame:
    """The table in polars."""
    try:
        import polars
    except ImportError as error:
        raise missing("polars", "polars", "make a DataFrame") from error
    series = []
    for name, column in table.stored().items():
        if isinstance(column, Lists):
            kind = polars.String if isinstance(column.values, Texts) else polars.Float64
            is_text = isinstance(column.values, Texts)
            values = [
                list(map(_encodable, value) if is_text else value) for value in column.array()
            ]
            series.append(polars.Series(name, values, dtype=polars.List(kind)))
        elif isinstance(column, Texts):
            texts = list(map(_encodable, column.array()))
            series.append(polars.Series(name, texts, dtype=polars.String))
        elif name in NULLABLE:
            one = polars.Series(name, column)
            series.append(one.set(one == NOTHING, None))
        else:
            series.append(polars.Series(name, column))
    return polars.DataFrame(series)


def write_parquet(
    tables: Mapping[TableName, Table], errors: Iterable[ScanError], directory: Path
) -> list[Path]:
    """Writes the tables and the errors, each file whole or not at all."""
    arrow = {name: arrow_table(table) for name, table in tables.items()}
    import pyarrow.parquet

    def save(table: pyarrow.Table) -> Callable[[BinaryIO], object]:
        return lambda file: pyarrow.parquet.write_table(table, file, compression="zstd")

    told = [{"path": os.fspath(error.path), "reason": error.reason} for error in errors]
    text = json.dumps({"schema_version": SCHEMA_VERSION, "errors": told}, indent=2)
    files: list[tuple[str, Callable[[BinaryIO], object]]] = [
        *((f"{name}.parquet", save(table)) for name, table in arrow.items()),
        ("errors.json", lambda file: file.write(text.encode())),
    ]
    return [write_whole(directory / name, write) for name, write in files]


def write_whole(target: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Writes a file whole or not at all, into a directory that is made.

    Args:
        target: where to.
        write: is given the open file.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic.writing(target) as file:
            write(file)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    return target
