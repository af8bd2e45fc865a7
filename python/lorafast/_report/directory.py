"""Files of an output directory, laid out as in NeuroTrain's tools.

```
analysis/{name}_analysis.json               everything measured of an adapter
analysis/analysis_report.md                 the page for a person (.html where asked for)
analysis/adapter_comparison.json            everything compared
analysis/comparison_report.md
visualizations/{name}_weight_analysis.png   and other pictures
```
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafast._analysis.names import numbered
from lorafast._errors import LorafastError
from lorafast._io import atomic
from lorafast._io.paths import find
from lorafast._io.plain import json_text
from lorafast._io.strangers import read_json, reason_of
from lorafast._report.serialize import from_plain

if TYPE_CHECKING:
    from lorafast._analysis.records import TensorStatistics
    from lorafast._analysis.results import AdapterAnalysis, Comparison

ANALYSIS_DIRECTORY = "analysis"
PLOT_DIRECTORY = "visualizations"
COMPARISON_JSON = "adapter_comparison.json"
ANALYSIS_SUFFIX = "_analysis.json"

#: The percentiles that NeuroTrain's dictionaries have.
NEUROTRAIN_PERCENTILES = {"25th": 25.0, "50th": 50.0, "75th": 75.0, "95th": 95.0, "99th": 99.0}


def file_stems(names: Sequence[str]) -> list[str]:
    """Names as parts of file names: distinct, and without what a file system would obey."""
    plain = [re.sub(r"[^\w.-]+", "_", name).strip(".") or "adapter" for name in names]
    # Room for the endings within the 255 bytes of a file name.
    return numbered([name.encode()[:180].decode(errors="ignore") for name in plain])


def neurotrain_dictionary(analysis: AdapterAnalysis, path: str | None = None) -> dict[str, Any]:
    """What NeuroTrain's `analyze_lora_weights` returns."""
    weights = analysis.weights
    layers: dict[str, dict[str, Any]] = {}
    for name, tensor in analysis.tensors.items():
        layers.setdefault(name.split(".lora_", 1)[0], {})[name] = _neurotrain_tensor(tensor)
    return {
        "adapter_path": analysis.path if path is None else path,
        "config": analysis.config,
        "weight_statistics": {
            "total_parameters": weights.count,
            "mean": weights.mean,
            "std": weights.std,
            "min": weights.min,
            "max": weights.max,
            "percentiles": {
                name: weights.percentiles[value] for name, value in NEUROTRAIN_PERCENTILES.items()
            },
        },
        "layer_analysis": layers,
    }


def _neurotrain_tensor(tensor: TensorStatistics) -> dict[str, Any]:
    figures: dict[str, Any] = {key: getattr(tensor, key) for key in ("mean", "std", "min", "max")}
    return {**figures, "shape": list(tensor.shape or ())}


def write_text(path: Path, text: str) -> Path:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return atomic.write(path, text)


def write_json(path: Path, value: Any) -> Path:
    """Writes strict JSON: NaN and infinities as null."""
    return write_text(path, json_text(value, default=str) + "\n")


def write_analysis(
    directory: Path, stem: str, analysis: AdapterAnalysis, path: str | None = None
) -> Path:
    """Writes `{stem}_analysis.json`: NeuroTrain's dictionary and everything else in one."""
    content = {**analysis.to_dict(), **neurotrain_dictionary(analysis, path)}
    return write_json(directory / f"{stem}{ANALYSIS_SUFFIX}", content)


def write_comparison(
    directory: Path, comparison: Comparison, neurotrain: Mapping[str, Any] | None = None
) -> Path:
    """Writes `adapter_comparison.json`: NeuroTrain's dictionary and everything else in one."""
    content = {**comparison.to_dict(), **(neurotrain or neurotrain_comparison(comparison))}
    return write_json(directory / COMPARISON_JSON, content)


def neurotrain_comparison(
    comparison: Comparison, paths: Sequence[str] | None = None
) -> dict[str, Any]:
    """What NeuroTrain's `compare_adapters` returns."""
    given = [analysis.path for analysis in comparison.analyses] if paths is None else list(paths)
    return {
        "adapters": given,
        "comparison_data": {
            analysis.name: neurotrain_dictionary(analysis, path)
            for analysis, path in zip(comparison.analyses, given, strict=True)
        },
    }


def write_plots(
    directory: Path, subject: AdapterAnalysis | Comparison, stem: str = ""
) -> list[Path]:
    """Draws the pictures of an analysis or a comparison that have files.

    Args:
        directory: where to; made if it is not there.
        subject: what to draw.
        stem: what the files of an analysis begin with.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    from lorafast._report.plots import png
    from lorafast._report.plots.draw import draw, plots_of

    written = []
    for plot in plots_of(subject).values():
        if plot.file is not None:
            figure = draw(subject, plot.kind)
            # Only now: without matplotlib there is no directory either.
            directory.mkdir(parents=True, exist_ok=True)
            written.append(Path(png.save(figure, directory / plot.file.format(name=stem))))
    return written


def read_directory(directory: Path) -> tuple[list[AdapterAnalysis], Comparison | None]:
    """What earlier runs have written into an output directory.

    Raises:
        LorafastError: there is nothing in it, or a file is not what its name says.
        OSError: it cannot be read.
    """
    if find(directory) is None:
        raise FileNotFoundError(2, "No such file or directory", str(directory))
    folder = directory / ANALYSIS_DIRECTORY
    analyses: list[Any] = [_read(path) for path in _files(folder)]
    comparison: Any = None
    if find(folder / COMPARISON_JSON) is not None:
        comparison = _read(folder / COMPARISON_JSON)
        # What stands in a file of its own is not in the comparison's.
        known = {(own.name, own.path): own for own in analyses}
        own = [known.get((each.name, each.path), each) for each in comparison.analyses]
        comparison = replace(comparison, analyses=own)
    if not analyses and comparison is None:
        raise LorafastError(
            f"{directory}: holds no {ANALYSIS_DIRECTORY}/*{ANALYSIS_SUFFIX}; "
            f"write some with: lorafast analyze ADAPTER --output {directory}"
        )
    return analyses, comparison


def _files(folder: Path) -> Iterable[Path]:
    return sorted(folder.glob(f"*{ANALYSIS_SUFFIX}"))


def _read(path: Path) -> AdapterAnalysis | Comparison:
    try:
        content = read_json(path, LorafastError)
        if not isinstance(content, dict):
            raise LorafastError("it is no JSON object")
        return from_plain(content)
    except (ValueError, RecursionError, LorafastError) as error:
        reason = reason_of(error).removeprefix(f"{path}: ")
        raise LorafastError(f"{path}: cannot be read as an analysis: {reason}") from error


def write_reports(
    output: Path,
    analyses: Sequence[AdapterAnalysis],
    comparison: Comparison | None,
    form: str,
) -> list[Path]:
    """Writes the pages of analyses and a comparison into an output directory.

    Markdown pages of several adapters share one file; an HTML page has a file of its own.

    Args:
        output: the output directory.
        analyses: the analyses with pages of their own.
        comparison: a comparison, if there is one.
        form: md, html, or json, which has no pages.

    Returns:
        The files written.
    """
    directory = output / ANALYSIS_DIRECTORY
    pages: dict[str, str] = {}
    if form == "md":
        if analyses:
            texts = [analysis.to_markdown() for analysis in analyses]
            pages["analysis_report.md"] = "\n---\n\n".join(texts)
        if comparison is not None:
            pages["comparison_report.md"] = comparison.to_markdown()
    elif form == "html":
        stems = file_stems([analysis.name for analysis in analyses])
        for stem, analysis in zip(stems, analyses, strict=True):
            name = "analysis_report.html" if len(stems) == 1 else f"{stem}_report.html"
            pages[name] = analysis.to_html()
        if comparison is not None:
            pages["comparison_report.html"] = comparison.to_html()
    return [write_text(directory / name, text) for name, text in pages.items()]
