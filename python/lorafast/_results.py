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
    from typing import Any

#: Of `to_dict` and `to_json`; raised when a field changes its meaning or goes away.
SCHEMA_VERSION = 2
#: Versions that are read: the first one had `figure` for a finding's `value`, and the severity
#: "severe" for "critical".
READ_VERSIONS = (1, SCHEMA_VERSION)

#: For a view and the name of a result's class, the module and its function.
VIEWS = {
    ("text", "AdapterAnalysis"): ("_report.lines", "analysis_text"),
    ("text", "Comparison"): ("_report.lines", "comparison_text"),
    ("text", "Lineage"): ("_report.lines", "lineage_text"),
    ("notebook", "AdapterAnalysis"): ("_report.lines", "notebook_findings"),
    ("notebook", "Comparison"): ("_report.lines", "notebook_findings"),
    ("notebook", "Result"): ("_report.lines", "notebook_line"),
    ("notebook", "MergeReport"): ("_report.lines", "notebook_page"),
    ("notebook", "SubtractReport"): ("_report.lines", "notebook_page"),
    ("markdown", "AdapterAnalysis"): ("_report.markdown", "analysis_page"),
    ("markdown", "Comparison"): ("_report.markdown", "comparison_page"),
    ("markdown", "MergeReport"): ("_report.merge", "merge_page"),
    ("markdown", "SubtractReport"): ("_report.merge", "subtract_page"),
    ("card", "MergePlan"): ("_report.card", "merge_card"),
    ("html", "AdapterAnalysis"): ("_report.html.analysis", "page"),
    ("html", "Comparison"): ("_report.html.comparison", "page"),
    ("html", "Fleet"): ("_report.html.fleet", "page"),
    ("plot", "AdapterAnalysis"): ("_report.plots.draw", "draw"),
    ("plot", "Comparison"): ("_report.plots.draw", "draw"),
    ("plot", "Similarity"): ("_report.plots.similarity", "clustered"),
    ("pandas", "AdapterAnalysis"): ("_report.frames", "analysis_pandas"),
    ("pandas", "Comparison"): ("_report.frames", "comparison_pandas"),
    ("polars", "AdapterAnalysis"): ("_report.frames", "analysis_polars"),
    ("polars", "Comparison"): ("_report.frames", "comparison_polars"),
}


def view(kind: str, result: object) -> Callable[..., Any]:
    """The function that makes a view of a result, which is its first argument.

    Args:
        kind: text, notebook, markdown, card, html, plot, pandas or polars.
        result: an object of a class in `VIEWS`, or of one derived from it.
    """
    from importlib import import_module

    keys = ((kind, each.__name__) for each in type(result).__mro__)
    module, name = next(VIEWS[key] for key in keys if key in VIEWS)
    function: Callable[..., Any] = getattr(import_module(f"lorafast.{module}"), name)
    return function


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
        import json

        from lorafast._io.plain import without_non_finite

        return json.dumps(without_non_finite(self.to_dict()), indent=self._indent, allow_nan=False)

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

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        text: str = view("notebook", self)(self)
        return text
