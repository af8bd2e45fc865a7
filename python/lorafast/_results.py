"""The base of results, and the table of their views by the class of the result.

A result is a value and imports none of its views (pages, plots, tables, texts); a view imports
the values that it shows. They meet in the table, and a view's module is imported when the view is
asked for.
"""

from __future__ import annotations

# Not `typing`'s, whose import takes longer than this module's.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from typing import Any, TypeVar

    import pandas
    import polars

    T = TypeVar("T")

#: Of `to_dict` and `to_json`; raised when a field changes its meaning or goes away.
SCHEMA_VERSION = 2
#: Versions that are read: the first one had `figure` for a finding's `value`, and the severity
#: "severe" for "critical".
READ_VERSIONS = (1, SCHEMA_VERSION)

#: For a view and the name of a result's class, the module and its function.
VIEWS = {
    ("line", "object"): ("_report.lines", "line"),
    ("text", "object"): ("_report.lines", "value_text"),
    ("text", "AdapterAnalysis"): ("_report.lines", "analysis_text"),
    ("text", "AlgebraReport"): ("_report.lines", "algebra_text"),
    ("text", "AdapterListing"): ("_report.lines", "listing_text"),
    ("text", "CheckpointListing"): ("_report.lines", "listing_text"),
    ("text", "Comparison"): ("_report.lines", "comparison_text"),
    ("text", "Duplicates"): ("_report.lines", "duplicates_text"),
    ("text", "Fleet"): ("_report.lines", "fleet_text"),
    ("text", "Lineage"): ("_report.lines", "lineage_text"),
    ("text", "MergePlan"): ("_report.lines", "plan_text"),
    ("text", "MergeReport"): ("_report.lines", "merge_text"),
    ("text", "ScanDiff"): ("_report.lines", "scan_diff_text"),
    ("text", "Similarity"): ("_report.lines", "similarity_text"),
    ("text", "SubtractReport"): ("_report.lines", "subtract_text"),
    ("text", "Table"): ("_report.lines", "table_text"),
    ("text", "Trajectory"): ("_report.lines", "trajectory_text"),
    ("text", "Verification"): ("_report.lines", "verification_text"),
    ("combination", "Lineage"): ("_report.lines", "combination_text"),
    ("notebook", "object"): ("_report.notebook", "page"),
    ("notebook", "Table"): ("_report.notebook", "table_page"),
    ("markdown", "AlgebraReport"): ("_report.algebra", "algebra_page"),
    ("markdown", "AdapterAnalysis"): ("_report.markdown", "analysis_page"),
    ("markdown", "Comparison"): ("_report.markdown", "comparison_page"),
    ("markdown", "MergeReport"): ("_report.merge", "merge_page"),
    ("markdown", "SubtractReport"): ("_report.merge", "subtract_page"),
    ("card", "MergePlan"): ("_report.card", "merge_card"),
    ("html", "AdapterAnalysis"): ("_report.html.analysis", "page"),
    ("html", "Comparison"): ("_report.html.comparison", "page"),
    ("html", "Fleet"): ("_report.html.fleet", "page"),
    ("plot", "AlgebraReport"): ("_report.plots.draw", "draw"),
    ("plot", "AdapterAnalysis"): ("_report.plots.draw", "draw"),
    ("plot", "Comparison"): ("_report.plots.draw", "draw"),
    ("plot", "Similarity"): ("_report.plots.similarity", "clustered"),
    ("pandas", "FramedResult"): ("_report.frames", "to_pandas"),
    ("polars", "FramedResult"): ("_report.frames", "to_polars"),
}


def view(kind: str, result: object) -> Callable[..., Any]:
    """The function that makes a view of a result, which is its first argument.

    Args:
        kind: line, text, combination, notebook, markdown, card, html, plot, pandas or polars.
        result: an object of a class in `VIEWS`, or of one derived from it.
    """
    from importlib import import_module

    keys = ((kind, each.__name__) for each in type(result).__mro__)
    module, name = next(VIEWS[key] for key in keys if key in VIEWS)
    function: Callable[..., Any] = getattr(import_module(f"lorafast.{module}"), name)
    return function


def _line(value: object) -> str:
    """The `__repr__` of a value: one line, whatever it holds."""
    text: str = view("line", value)(value)
    return text


def _page(value: object) -> str:
    """The `_repr_html_` of a value, which a notebook shows."""
    text: str = view("notebook", value)(value)
    return text


def shown(record: type[T]) -> type[T]:
    """Gives a record a `__repr__` of one line, and the `_repr_html_` that a notebook shows."""
    # Of any class, which need not declare them.
    record.__repr__ = _line  # type: ignore[method-assign]
    record._repr_html_ = _page  # type: ignore[attr-defined]
    return record


# Containers of records are as long as a model has modules or tensors. Whoever looks at one wants to
# see what it holds, and not all of it. `Any` is a text, for `typing` is not imported.
@shown
class RecordDict(dict["Any", "Any"]):
    """A dictionary of which a part is shown."""

    __slots__ = ()


@shown
class RecordList(list["Any"]):
    """A list of which a part is shown."""

    __slots__ = ()


@shown
class RecordTuple(tuple["Any", ...]):
    """A tuple of which a part is shown."""

    __slots__ = ()


@shown
class Result:
    """What every result can be turned into.

    A derived class says what kind of result it is, and by `_plain` what of it is kept where that
    is not every field.
    """

    __slots__ = ()

    #: What `to_dict` calls it.
    _kind: str = ""
    #: Blanks before each level of the JSON; `None` for all of it in one line.
    _indent: int | None = 2

    def _plain(self) -> dict[str, Any]:
        """What `to_dict` keeps, as plain objects."""
        from lorafast._io.plain import fields_of

        return fields_of(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain objects, with `schema_version` and `kind`; NaN stays NaN."""
        return {"schema_version": SCHEMA_VERSION, "kind": self._kind, **self._plain()}

    def to_json(self) -> str:
        """`to_dict` as strict JSON: NaN and infinities, which JSON does not have, become null."""
        from lorafast._io.plain import json_text, without_non_finite

        if self._indent is not None:
            return json_text(self.to_dict())
        import json

        return json.dumps(without_non_finite(self.to_dict()), allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json` into a file, whole or not at all.

        Args:
            path: the file; `~` is the home directory, and one that is there is replaced.

        Raises:
            OSError: it cannot be written.
        """
        from lorafast._io import atomic
        from lorafast._io.paths import expand

        atomic.write(expand(path), self.to_json() + "\n")

    if TYPE_CHECKING:

        def _repr_html_(self) -> str: ...


class FramedResult(Result):
    """A result with a table of its parts: a row for each, and columns of numbers and texts."""

    __slots__ = ()

    def to_pandas(self) -> pandas.DataFrame:
        """The parts as a data frame, a row for each.

        Columns have names in snake_case, floats are float64 with NaN where there is none, and
        whole numbers that may be missing are pandas' Int64.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        frame: pandas.DataFrame = view("pandas", self)(self)
        return frame

    def to_polars(self) -> polars.DataFrame:
        """The parts as a data frame, a row for each; the columns are those of `to_pandas`.

        Raises:
            MissingDependencyError: polars is not installed.
        """
        frame: polars.DataFrame = view("polars", self)(self)
        return frame
