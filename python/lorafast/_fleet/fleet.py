"""A fleet: what many adapters hold, as tables that any data frame library takes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafast._analysis.names import position_of
from lorafast._errors import OutputError, missing
from lorafast._fleet.entry import SCHEMA_VERSION
from lorafast._fleet.table import NOTHING, TABLES, Table
from lorafast._io import atomic
from lorafast._io.paths import expand
from lorafast._results import Result, view

if TYPE_CHECKING:
    from typing import BinaryIO

    import pandas
    import polars
    import pyarrow

    from lorafast._fleet.rows import ErrorList, FindingList
    from lorafast._types import Metrics, Source, TableName

#: Columns of whole numbers in which -1 stands for nothing.
NULLABLE = ("block",)


@dataclass(frozen=True, eq=False, repr=False)
class Fleet(Result):
    """Many adapters, each with what it holds. Made by `lorafast.scan`.

    Adapters and modules stand in the order in which the adapters were found. Which columns there
    are depends on `metrics`; norms, ranks and the other figures of a module have the names and
    meanings of `ModuleAnalysis`, those of an adapter the ones in `AdapterAnalysis.summary` and
    (of all its weights together) of `TensorStatistics`.

    Attributes:
        metrics: how much was asked for: "full", "headers", "moments" or "spectra".
        adapters: a row for each adapter. Always: `path`, `name`, `peft_type`, `base`, `rank`,
            `alpha` and `scaling` (those that most of its modules have), `scaling_rule`,
            `modules`, `tensors`, `parameters`, `bytes`, `dtypes`, `blake3` (of the weights file;
            `None` with "headers"), `severe`, `warnings`, `notes` (numbers of findings),
            `findings` (a list of their kinds). With moments: `mean`, `std`, `min`, `max`,
            `l2_norm`, `skewness`, `kurtosis`, `zero_share`, `non_finite`. With spectra:
            `frobenius_norm`, `max_spectral_norm`, `median_spectral_norm`, `mean_effective_rank`.
        modules: a row for each module. Always: `adapter` (its name), `module` (its path), `block`
            (−1 outside of blocks), `layer`, `kind`, `out_features`, `in_features`, `rank`,
            `alpha`, `scaling`. With moments, for the stored A and B each: `a_mean`, `a_std`,
            `a_min`, `a_max`, `a_l2_norm`, `a_skewness`, `a_kurtosis`, `a_zero_share`, `b_mean`, …
            With spectra: `frobenius_norm`, `spectral_norm`, `stable_rank`, `effective_rank`,
            `energy_effective_rank`, `participation_ratio`, `k90`, `k95`, `k99`,
            `numerical_rank`, `condition`, `entry_mean`, and `singular_values`, a list.
        findings: what to look at, the critical first: a sequence of `FleetFinding`, each made when
            it is asked for. `table("findings")` has a row for each: `adapter` (its name; `None` of
            the whole fleet), `severity`, `kind`, `module` (its path; `None` of the whole adapter),
            `figure` (NaN where there is none), `count`, `reason`.
        errors: what could not be read: a sequence of records with `path` and `reason`.
        bytes_read: bytes of the weights files that were not taken from the cache; with "headers"
            that is their size, of which only the headers were read.
        remembered: adapters that were taken from the cache.
        root: the directory that names are paths below: the one that was scanned, and of several
            what holds them all.
    """

    metrics: Metrics
    adapters: Table
    modules: Table
    findings: FindingList
    errors: ErrorList
    bytes_read: int
    remembered: int
    root: Path = Path()

    _kind = "fleet"

    def __len__(self) -> int:
        return self.adapters.rows

    @property
    def paths(self) -> list[Path]:
        """Where each adapter lies."""
        return [Path(path) for path in self.adapters["path"]]

    @property
    def names(self) -> list[str]:
        """A distinct name for each adapter: its path below `root`, with slashes.

        An adapter that is the root itself has the root's own name.
        """
        names: list[str] = self.adapters["name"].tolist()
        return names

    def position(self, adapter: Source) -> int:
        """The row of an adapter, by its name or by its path, however that is spelled.

        Raises:
            KeyError: it is none of the fleet's.
        """
        return position_of(adapter, self.names, self.paths)

    def __getitem__(self, adapter: Source) -> dict[str, Any]:
        """What the table has of one adapter, by its name or by its path.

        Raises:
            KeyError: it is none of the fleet's.
        """
        row = self.position(adapter)
        return {**self.adapters.row(row), "findings": self.adapters["findings"][row]}

    def __contains__(self, adapter: object) -> bool:
        if not isinstance(adapter, str | os.PathLike):
            return False
        try:
            self.position(adapter)
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        """The adapters' names."""
        return iter(self.names)

    def table(self, name: TableName = "adapters") -> Table:
        """One of the three tables by its name.

        Raises:
            ValueError: there is no such table.
        """
        if name not in TABLES:
            raise ValueError(f"table must be 'adapters', 'modules' or 'findings', not {name!r}")
        if name == "findings":
            return self.findings.table
        return self.adapters if name == "adapters" else self.modules

    def to_arrow(self, table: TableName = "adapters") -> pyarrow.Table:
        """A table as Arrow's: repeated texts as dictionaries, lists as lists, −1 blocks as nulls.

        Raises:
            ValueError: there is no such table.
            MissingDependencyError: pyarrow is not installed.
        """
        wanted = self.table(table)
        try:
            import pyarrow
        except ImportError as error:
            raise missing("pyarrow", "arrow", "make an Arrow table") from error
        made: pyarrow.Table = pyarrow.table(wanted)
        return made

    def to_pandas(self, table: TableName = "adapters") -> pandas.DataFrame:
        """A table as pandas'.

        Raises:
            ValueError: there is no such table.
            MissingDependencyError: pandas is not installed.
        """
        wanted = self.table(table)
        try:
            import pandas
        except ImportError as error:
            raise missing("pandas", "pandas", "make a DataFrame") from error
        frame = pandas.DataFrame({name: wanted[name] for name in wanted})
        for name in NULLABLE:
            if name in frame:
                frame[name] = frame[name].astype("Int64").mask(frame[name] == NOTHING)
        return frame

    def to_polars(self, table: TableName = "adapters") -> polars.DataFrame:
        """A table as polars'.

        Raises:
            ValueError: there is no such table.
            MissingDependencyError: polars is not installed.
        """
        wanted = self.table(table)
        try:
            import polars
        except ImportError as error:
            raise missing("polars", "polars", "make a DataFrame") from error
        frame = polars.DataFrame(wanted)
        coded = [name for name, kind in frame.schema.items() if kind == polars.Categorical]
        return frame.with_columns(polars.col(coded).cast(polars.String))

    def to_parquet(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Writes `adapters.parquet`, `modules.parquet`, `findings.parquet` and `errors.json`.

        The tables are compressed with zstd and have `lorafast.schema_version` in their metadata.
        Each file is put in its place when it is whole.

        Args:
            directory: where to; it is made if it is not there.

        Returns:
            The files.

        Raises:
            OutputError: the directory cannot be written.
            MissingDependencyError: pyarrow is not installed.
        """
        tables = {name: self.to_arrow(name) for name in TABLES}
        import pyarrow.parquet

        def save(table: pyarrow.Table) -> Callable[[BinaryIO], object]:
            return lambda file: pyarrow.parquet.write_table(table, file, compression="zstd")

        errors = [{"path": os.fspath(error.path), "reason": error.reason} for error in self.errors]
        about: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "metrics": self.metrics}
        about |= {"root": os.fspath(self.root), "errors": errors}
        text = json.dumps(about, indent=2)
        files: list[tuple[str, Callable[[BinaryIO], object]]] = [
            *((f"{name}.parquet", save(table)) for name, table in tables.items()),
            ("errors.json", lambda file: file.write(text.encode())),
        ]
        return [write_whole(Path(expand(directory)) / name, write) for name, write in files]

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        """The adapters' table for any library that speaks Arrow's C stream interface."""
        return self.adapters.__arrow_c_stream__(requested_schema)

    def _plain(self) -> dict[str, Any]:
        """The adapters' table, findings and errors; the modules are for Parquet."""
        from lorafast._io.plain import to_plain

        columns = {name: self.adapters[name].tolist() for name in self.adapters}
        return {
            "metrics": self.metrics,
            "root": os.fspath(self.root),
            "adapters": [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ],
            "findings": [
                {"adapter": item.adapter, **to_plain(item.finding), "count": item.count}
                for item in self.findings
            ],
            "errors": to_plain(list(self.errors)),
        }

    def to_html(self, *, similarity: Any = "auto") -> str:
        """One HTML document that loads nothing from elsewhere: for a person to look at.

        Args:
            similarity: what `lorafast.similarity(fleet)` returned, for the clustered matrix of
                cosines: any value with `matrix` (N×N) and `names`. "auto" computes it for up to
                1000 adapters, `None` leaves it out.

        Raises:
            MissingDependencyError: plotly is not installed.
        """
        text: str = view("html", self)(self, similarity)
        return text


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


# What users see, and what a pickle names.
Fleet.__module__ = "lorafast"
