"""The views of results: where each page, figure and text is made, by the class of the result.

A result is a value and imports none of its views; a view imports the values that it shows. They
meet in this table alone, and a view's module is imported when the view is asked for.
"""

from __future__ import annotations

# Not `typing`'s, whose import takes longer than this module's.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

#: For a view and the name of a result's class, the module and its function.
VIEWS = {
    ("text", "AdapterAnalysis"): ("_report.text", "analysis_text"),
    ("text", "Comparison"): ("_report.text", "comparison_text"),
    ("notebook", "AdapterAnalysis"): ("_report.text", "notebook"),
    ("notebook", "Comparison"): ("_report.text", "notebook"),
    ("markdown", "AdapterAnalysis"): ("_report.markdown", "analysis_page"),
    ("markdown", "Comparison"): ("_report.markdown", "comparison_page"),
    ("markdown", "MergeReport"): ("_report.merge", "merge_page"),
    ("markdown", "SubtractReport"): ("_report.merge", "subtract_page"),
    ("html", "AdapterAnalysis"): ("_report.html.analysis", "page"),
    ("html", "Comparison"): ("_report.html.comparison", "page"),
    ("html", "Fleet"): ("_report.html.fleet", "page"),
    ("plot", "AdapterAnalysis"): ("_report.plots.draw", "analysis_figure"),
    ("plot", "Comparison"): ("_report.plots.draw", "comparison_figure"),
    ("plot", "Similarity"): ("_report.plots.similarity", "clustered"),
    ("pandas", "AdapterAnalysis"): ("_report.frames", "analysis_pandas"),
    ("pandas", "Comparison"): ("_report.frames", "comparison_pandas"),
    ("polars", "AdapterAnalysis"): ("_report.frames", "analysis_polars"),
    ("polars", "Comparison"): ("_report.frames", "comparison_polars"),
}


def view(kind: str, result: object) -> Callable[..., Any]:
    """The function that makes a view of a result, which is its first argument.

    Args:
        kind: text, notebook, markdown, html, plot, pandas or polars.
        result: an object of a class in `VIEWS`, or of one derived from it.
    """
    from importlib import import_module

    keys = ((kind, each.__name__) for each in type(result).__mro__)
    module, name = next(VIEWS[key] for key in keys if key in VIEWS)
    function: Callable[..., Any] = getattr(import_module(f"lorafast.{module}"), name)
    return function
