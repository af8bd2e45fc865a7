"""NeuroTrain's LoRA tools under their own names, so that a script changes one import.

```python
from lorafast.analyzers import LoRAAnalyzer

analyzer = LoRAAnalyzer(output_dir="runs/lora_analysis")
analyzer.merge_adapters("llama", ["style", "facts"], "mixed", merge_strategy="average")
results = analyzer.analyze_lora_weights("style")
print(analyzer.generate_report(results))
```

New code will find `lorafast.merge`, `lorafast.analyze` and `lorafast.compare` plainer and fuller.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafast._analysis import api as analysis_api
from lorafast._analysis.names import names_of, numbered
from lorafast._analysis.options import AnalysisOptions
from lorafast._errors import LorafastError, MissingDependencyError
from lorafast._io.packages import require
from lorafast._io.paths import expand
from lorafast._io.sources import (
    ADAPTER_PATTERNS,
    BASE_PATTERNS,
    as_list,
    device_needs,
    locate,
    readers_needs,
)
from lorafast._io.strangers import read_json
from lorafast._report.directory import (
    ANALYSIS_DIRECTORY,
    PLOT_DIRECTORY,
    file_stems,
    neurotrain_comparison,
    neurotrain_dictionary,
    write_analysis,
    write_comparison,
    write_json,
    write_plots,
    write_text,
)
from lorafast._types import Source

if TYPE_CHECKING:
    from lorafast._analysis.results import AdapterAnalysis, Comparison
    from lorafast._types import Strategy

__all__ = [
    "LoRAAnalyzer",
    "UnifiedAnalyzer",
    "analyze_lora_weights",
    "compare_lora_adapters",
    "merge_lora_adapters",
]


DEFAULT_OUTPUT = "runs/lora_analysis"
#: Layers that `generate_report` has a section for; the JSON has all of them.
MAX_SECTIONS = 18


class LoRAAnalyzer:
    """Merges and analyses adapters, and files the results in one output directory.

    Attributes:
        output_dir: the directory; made, with the three below, if it is not there.
        merge_dir: `merged_models/` in it.
        analysis_dir: `analysis/` in it.
        visualization_dir: `visualizations/` in it.
    """

    def __init__(
        self,
        output_dir: Source = DEFAULT_OUTPUT,
        device: str = "auto",
        use_proxy: bool = False,
        trust_remote_code: bool = False,
        local_files_only: bool = False,
    ) -> None:
        """Makes the directories.

        Args:
            output_dir: where results go.
            device: what merges compute on, as for `lorafast.merge`.
            use_proxy: has no effect; the hub's client follows HTTPS_PROXY by itself.
            trust_remote_code: has no effect; no code of a model or adapter is ever run.
            local_files_only: take hub ids from the local cache, and never ask the hub.
        """
        self.output_dir = Path(expand(output_dir))
        self.device = device
        self.use_proxy = use_proxy
        self.trust_remote_code = trust_remote_code
        self.local_files_only = local_files_only
        self.merge_dir = self.output_dir / "merged_models"
        self.analysis_dir = self.output_dir / ANALYSIS_DIRECTORY
        self.visualization_dir = self.output_dir / PLOT_DIRECTORY
        for directory in (self.merge_dir, self.analysis_dir, self.visualization_dir):
            directory.mkdir(parents=True, exist_ok=True)
        # Files of this analyzer's adapters: two of one base name get different ones.
        self._names: dict[str, str] = {}

    def merge_adapters(  # noqa: PLR0917 (NeuroTrain's signature)
        self,
        base_model: Source,
        adapters: Source | Sequence[Source],
        output_name: str,
        merge_strategy: Strategy = "sequential",
        weights: Sequence[float] | None = None,
        merge_dtype: Any = None,
        save_tokenizer: bool = True,
        save_safetensors: bool = True,
    ) -> dict[str, Any]:
        """Merges adapters into a base, as `lorafast.merge` does.

        Args:
            base_model: the base's directory, `.safetensors` file or hub id.
            adapters: one adapter or several, in order.
            output_name: the model's directory in `merge_dir`; one of that name is replaced.
            merge_strategy: sequential (each in order at its full scale), weighted, or average.
            weights: a factor for each adapter, for `weighted`; all 1.0 if `None`. The other
                strategies have none and leave it aside.
            merge_dtype: float16, bfloat16 or float32, as a name or a torch.dtype; the base's own
                if `None` or "auto".
            save_tokenizer: keep the base's tokenizer files.
            save_safetensors: `False` writes `.bin` files through torch instead.

        Returns:
            `base_model, adapters, merge_strategy, weights, output_path, model_size_mb` (MiB),
            `total_parameters`; the same is written as `merge_info.json` beside the model.

        Raises:
            ValueError: an argument is outside its domain.
            MissingDependencyError: `save_safetensors=False` and torch is not installed.
            LorafastError, OSError: as `lorafast.merge`.
        """
        from lorafast._merge import merged_files
        from lorafast._merge.api import plan
        from lorafast._merge.options import ExecutionOptions

        if output_name in ("", ".", "..") or Path(output_name).name != output_name:
            raise ValueError(f"output_name {output_name!r} must be the name of one directory")
        sources = as_list(adapters)
        needs = readers_needs(base_model, *sources) | device_needs(self.device)
        if not save_safetensors:
            needs |= merged_files.PICKLE_NEEDS
        require(needs)
        output = self.merge_dir / output_name
        given = None if weights is None else [float(weight) for weight in weights]
        planned = plan(
            self._locate(base_model, BASE_PATTERNS),
            [self._locate(adapter, ADAPTER_PATTERNS) for adapter in sources],
            strategy=merge_strategy,
            weights=None if merge_strategy in ("sequential", "average") else given,
            dtype="auto" if merge_dtype is None else str(merge_dtype).removeprefix("torch."),
        )
        execution = ExecutionOptions(device=self.device, overwrite=True)
        report = merged_files.carry_out(
            planned,
            output,
            execution,
            save_tokenizer=save_tokenizer,
            save_safetensors=save_safetensors,
        )
        info = {
            "base_model": os.fspath(base_model),
            "adapters": [os.fspath(adapter) for adapter in sources],
            "merge_strategy": merge_strategy,
            "weights": report.weights if given is None else given,
            "output_path": str(output),
            "model_size_mb": report.model_size_mb,
            "total_parameters": report.total_parameters,
        }
        try:
            write_json(output / "merge_info.json", info)
        except OSError as error:
            # The model is finished.
            warnings.warn(f"{output}: merge_info.json could not be written: {error}", stacklevel=2)
        return info

    def analyze_lora_weights(self, adapter_path: Source, save_plots: bool = True) -> dict[str, Any]:
        """Analyses an adapter, as `lorafast.analyze` does, and files the result.

        Writes `analysis/{name}_analysis.json` and, with `save_plots`,
        `visualizations/{name}_weight_analysis.png`, `{name}_weight_heatmap.png` and
        `{name}_spectrum.png`. Without matplotlib there are no pictures, and a warning says so.

        Args:
            adapter_path: the adapter's directory, weights file or hub id.
            save_plots: draw the pictures.

        Returns:
            `adapter_path`, `config`, `weight_statistics` (`total_parameters, mean, std, min, max,
            percentiles` with the keys 25th, 50th, 75th, 95th, 99th) and `layer_analysis`: layer
            (the tensor's name before `.lora_`) → tensor → `mean, std, min, max, shape`.

        Raises:
            LorafastError, OSError: as `lorafast.analyze`.
        """
        name = self._name(adapter_path)
        located = self._locate(adapter_path, ADAPTER_PATTERNS)
        analysis = analysis_api.analyze_named(located, name, AnalysisOptions())
        (stem,) = file_stems([name])
        given = os.fspath(adapter_path)
        write_analysis(self.analysis_dir, stem, analysis, given)
        if save_plots:
            self._plot(analysis, stem)
        return neurotrain_dictionary(analysis, given)

    def compare_adapters(
        self, adapters: Sequence[Source], save_plots: bool = True
    ) -> dict[str, Any]:
        """Compares adapters, as `lorafast.compare` does, and files the result.

        Writes `analysis/adapter_comparison.json`, an `{name}_analysis.json` for each adapter and,
        with `save_plots`, `visualizations/adapter_comparison.png`,
        `weight_distribution_comparison.png` and `adapter_cosine.png`.

        Args:
            adapters: two or more adapters' directories, weights files or hub ids.
            save_plots: draw the pictures.

        Returns:
            `adapters` and `comparison_data`: each adapter's name → what `analyze_lora_weights`
            returns. Two adapters of one base name have their parents' names before it.

        Raises:
            ValueError: there are fewer than two adapters.
            LorafastError, OSError: as `lorafast.compare`.
        """
        sources = as_list(adapters)
        names = names_of(sources)
        located = [self._locate(source, ADAPTER_PATTERNS) for source in sources]
        comparison = analysis_api.compare(located, names=names)
        paths = [os.fspath(source) for source in sources]
        stems = file_stems(names)
        for stem, analysis, path in zip(stems, comparison.analyses, paths, strict=True):
            write_analysis(self.analysis_dir, stem, analysis, path)
        result = neurotrain_comparison(comparison, paths)
        write_comparison(self.analysis_dir, comparison, result)
        if save_plots:
            self._plot(comparison, "")
        return result

    def generate_report(self, analysis_results: Mapping[str, Any]) -> str:
        """Writes `analysis/analysis_report.md` from what `analyze_lora_weights` returned.

        Args:
            analysis_results: the result of `analyze_lora_weights` or `compare_adapters`.

        Returns:
            The Markdown.
        """
        text = _neurotrain_report(analysis_results)
        write_text(self.analysis_dir / "analysis_report.md", text)
        return text

    def _locate(self, source: Source, patterns: list[str]) -> Path:
        return locate(source, patterns, local_files_only=self.local_files_only)

    def _name(self, adapter: Source) -> str:
        """A name that no other adapter in this output directory has, the same each time."""
        key = _given(adapter)
        if key not in self._names:
            # Those that were named first keep their names, since files are named after them.
            (short,) = names_of([key])
            taken = list(self._names.values())
            earlier = self._owner(short)
            if short.casefold() in (name.casefold() for name in taken) or earlier not in {
                None,
                key,
            }:
                others = [*self._names, *([earlier] if earlier else [])]
                short = names_of([*others, key])[-1]
            candidate, number = numbered([*taken, short])[-1], 2
            while self._owner(candidate) not in {None, key}:
                candidate, number = f"{short}_{number}", number + 1
            self._names[key] = candidate
        return self._names[key]

    def _owner(self, name: str) -> str | None:
        """The adapter, of this analyzer or an earlier one, whose analysis has that file name."""
        (stem,) = file_stems([name])
        try:
            written = read_json(self.analysis_dir / f"{stem}_analysis.json")
            return _given(written["adapter_path"])
        except (LorafastError, OSError, ValueError, KeyError, TypeError):
            # Not there, or nothing that an analyzer wrote.
            return None

    def _plot(self, subject: AdapterAnalysis | Comparison, stem: str) -> None:
        try:
            write_plots(self.visualization_dir, subject, stem)
        except MissingDependencyError as error:
            warnings.warn(f"no pictures were drawn: {error}", stacklevel=3)


def _given(adapter: Source) -> str:
    """What tells an adapter from others: its whole path with links as given, or its hub id."""
    path = expand(adapter)
    # A Path would keep the dots in it.
    return os.path.abspath(path) if os.path.lexists(path) else os.fspath(adapter)  # noqa: PTH100


class UnifiedAnalyzer:
    """The three tasks behind one object.

    Attributes:
        output_dir: where results go.
        lora_analyzer: the `LoRAAnalyzer` that does the work.
    """

    def __init__(self, output_dir: Source = "output/analysis") -> None:
        """Makes the output directory."""
        self.output_dir = Path(expand(output_dir))
        self.lora_analyzer = LoRAAnalyzer(output_dir=self.output_dir)

    def analyze_lora_weights(self, adapter_path: Source, save_plots: bool = True) -> dict[str, Any]:
        """`LoRAAnalyzer.analyze_lora_weights`."""
        return self.lora_analyzer.analyze_lora_weights(adapter_path, save_plots=save_plots)

    def merge_lora_adapters(
        self,
        base_model: Source,
        adapters: Source | Sequence[Source],
        output_name: str,
        **options: Any,
    ) -> dict[str, Any]:
        """`LoRAAnalyzer.merge_adapters`, with its options."""
        return self.lora_analyzer.merge_adapters(base_model, adapters, output_name, **options)

    def compare_lora_adapters(
        self, adapters: Sequence[Source], save_plots: bool = True
    ) -> dict[str, Any]:
        """`LoRAAnalyzer.compare_adapters`."""
        return self.lora_analyzer.compare_adapters(adapters, save_plots=save_plots)


def analyze_lora_weights(
    adapter_path: Source, output_dir: Source = DEFAULT_OUTPUT, save_plots: bool = True
) -> dict[str, Any]:
    """`LoRAAnalyzer(output_dir).analyze_lora_weights(adapter_path)`."""
    return LoRAAnalyzer(output_dir).analyze_lora_weights(adapter_path, save_plots=save_plots)


def merge_lora_adapters(
    base_model: Source,
    adapters: Source | Sequence[Source],
    output_name: str,
    output_dir: Source = DEFAULT_OUTPUT,
    **options: Any,
) -> dict[str, Any]:
    """`LoRAAnalyzer(output_dir).merge_adapters(…)`, with its options."""
    return LoRAAnalyzer(output_dir).merge_adapters(base_model, adapters, output_name, **options)


def compare_lora_adapters(
    adapters: Sequence[Source], output_dir: Source = DEFAULT_OUTPUT, save_plots: bool = True
) -> dict[str, Any]:
    """`LoRAAnalyzer(output_dir).compare_adapters(adapters)`."""
    return LoRAAnalyzer(output_dir).compare_adapters(adapters, save_plots=save_plots)


def _neurotrain_report(results: Mapping[str, Any]) -> str:
    """The report in NeuroTrain's form."""
    lines = ["# LoRA Analysis Report", ""]
    lines += [f"**Analysis Date**: {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}", ""]
    adapters: Mapping[str, Any] = results.get("comparison_data") or {"": results}
    share = max(1, MAX_SECTIONS // len(adapters))
    for name, analysis in adapters.items():
        lines += _neurotrain_pages(name, analysis, share)
    return "\n".join(lines).rstrip() + "\n"


def _neurotrain_pages(name: str, results: Mapping[str, Any], most: int) -> list[str]:
    from lorafast._report.cells import cell, code, table
    from lorafast._report.text import format_number

    statistics, config = results["weight_statistics"], results["config"]
    of = f" of {cell(name)}" if name else ""
    lines = [f"## Summary{of}", ""]
    facts = {
        "Adapter": code(results["adapter_path"]),
        "Base": code(config.get("base_model_name_or_path")),
        "Rank": format_number(config.get("r")),
        "Alpha": format_number(config.get("lora_alpha")),
        "Total parameters": f"{statistics['total_parameters']:,}",
        **{key: format_number(statistics[key]) for key in ("mean", "std", "min", "max")},
        **{f"{key} percentile": format_number(v) for key, v in statistics["percentiles"].items()},
    }
    lines += table(["", ""], ([key.capitalize(), value] for key, value in facts.items()))
    layers = results["layer_analysis"]
    lines += ["", f"## Layer Analysis{of}", ""]
    for layer, tensors in list(layers.items())[:most]:
        lines += [f"### {cell(layer)}", ""]
        rows = (
            [
                # Within its section, the layer's own name goes without saying.
                code(tensor.removeprefix(layer).lstrip(".") or tensor),
                " × ".join(map(str, figures["shape"])),
                *(format_number(figures[key]) for key in ("mean", "std", "min", "max")),
            ]
            for tensor, figures in list(tensors.items())[:4]
        )
        lines += [*table(["tensor", "shape", "mean", "std", "min", "max"], rows), ""]
    if len(layers) > most:
        lines += [f"{len(layers) - most} more layers are in the JSON file.", ""]
    return lines
