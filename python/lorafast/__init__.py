"""Merge LoRA adapters into safetensors checkpoints, and measure what adapters hold.

`merge` writes `W + s·B·A` for every weight that an adapter updates, file to file, without loading
the model; `plan` says beforehand what it would do, `verify` afterwards whether it was done right,
`subtract` undoes it, and `recover` brings to order what a killed one left. `open_merged` has the
merged tensors and writes nothing. `inspect` lists what a file holds, and `convert` writes an
adapter in another format. `analyze` measures an adapter, `compare` several of them.
`lorafast.analyzers` does the same under the names of NeuroTrain's tools.
"""

from lorafast._core import __version__, build_info
from lorafast._errors import (
    AdapterError,
    CheckpointError,
    DeviceError,
    LorafastError,
    MissingDependencyError,
    NumericError,
    OutputError,
    PlanError,
    StoreError,
    TensorNotFoundError,
    UnsupportedAdapterError,
    VerificationError,
    WorkerError,
)

# Not `typing`'s, whose import would take as long as all that is imported here; type checkers know
# the name.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from lorafast import analyzers as analyzers
    from lorafast import errors as errors
    from lorafast import torch as torch
    from lorafast._algebra.api import bake, combine, extract, resize
    from lorafast._algebra.report import (
        AlgebraReport,
        BakeReport,
        BudgetUse,
        CombineReport,
        ExtractReport,
        ModuleExtraction,
        ModuleResult,
        ResizeReport,
    )
    from lorafast._analysis.api import analyze, compare
    from lorafast._analysis.records import (
        EntryStatistics,
        Finding,
        Histogram,
        ModuleAnalysis,
        ModuleComparison,
        PairComparison,
        TensorStatistics,
    )
    from lorafast._analysis.results import AdapterAnalysis, Comparison
    from lorafast._convert.api import convert
    from lorafast._convert.report import ConversionReport
    from lorafast._fleet.difference import AdapterChange, FindingChange, ScanDiff, scan_diff
    from lorafast._fleet.discovery import ScanError
    from lorafast._fleet.findings import FleetFinding
    from lorafast._fleet.fleet import Fleet
    from lorafast._fleet.scan import scan
    from lorafast._merge.api import merge, open_merged, plan, subtract, verify
    from lorafast._merge.clean import clean
    from lorafast._merge.inspect import inspect
    from lorafast._merge.listing import AdapterListing, CheckpointListing
    from lorafast._merge.plan import MergePlan, PlanPart, WrittenShard
    from lorafast._merge.planned import PlannedTensor, Update
    from lorafast._merge.recover import recover
    from lorafast._merge.report import MergeReport
    from lorafast._merge.subtract import SubtractReport
    from lorafast._merge.verify import Verification
    from lorafast._merge.view import MergedSlice, MergedView
    from lorafast._similarity.api import similarity
    from lorafast._similarity.duplicates import DuplicateGroup, Duplicates, Evidence, duplicates
    from lorafast._similarity.lineage import Lineage, lineage
    from lorafast._similarity.similarity import Similarity
    from lorafast._similarity.trajectory import Checkpoint, Trajectory, trajectory
    from lorafast.analyzers import LoRAAnalyzer as LoRAAnalyzer
    from lorafast.analyzers import UnifiedAnalyzer as UnifiedAnalyzer
    from lorafast.analyzers import analyze_lora_weights as analyze_lora_weights
    from lorafast.analyzers import compare_lora_adapters as compare_lora_adapters
    from lorafast.analyzers import merge_lora_adapters as merge_lora_adapters

__all__ = [
    "AdapterAnalysis",
    "AdapterChange",
    "AdapterError",
    "AdapterListing",
    "AlgebraReport",
    "BakeReport",
    "BudgetUse",
    "Checkpoint",
    "CheckpointError",
    "CheckpointListing",
    "CombineReport",
    "Comparison",
    "ConversionReport",
    "DeviceError",
    "DuplicateGroup",
    "Duplicates",
    "EntryStatistics",
    "Evidence",
    "ExtractReport",
    "Finding",
    "FindingChange",
    "Fleet",
    "FleetFinding",
    "Histogram",
    "Lineage",
    "LorafastError",
    "MergePlan",
    "MergeReport",
    "MergedSlice",
    "MergedView",
    "MissingDependencyError",
    "ModuleAnalysis",
    "ModuleComparison",
    "ModuleExtraction",
    "ModuleResult",
    "NumericError",
    "OutputError",
    "PairComparison",
    "PlanError",
    "PlanPart",
    "PlannedTensor",
    "ResizeReport",
    "ScanDiff",
    "ScanError",
    "Similarity",
    "StoreError",
    "SubtractReport",
    "TensorNotFoundError",
    "TensorStatistics",
    "Trajectory",
    "UnsupportedAdapterError",
    "Update",
    "Verification",
    "VerificationError",
    "WorkerError",
    "WrittenShard",
    "__version__",
    "analyze",
    "bake",
    "build_info",
    "clean",
    "combine",
    "compare",
    "convert",
    "duplicates",
    "extract",
    "inspect",
    "lineage",
    "merge",
    "open_merged",
    "plan",
    "recover",
    "resize",
    "scan",
    "scan_diff",
    "similarity",
    "subtract",
    "trajectory",
    "verify",
]

# Where each of the other names is at home. The first use of one imports that module alone, so that
# a command or a script waits only for what it uses.
_HOMES = {
    "_algebra.api": ("bake", "combine", "extract", "resize"),
    "_algebra.report": (
        "AlgebraReport",
        "BakeReport",
        "BudgetUse",
        "CombineReport",
        "ExtractReport",
        "ModuleExtraction",
        "ModuleResult",
        "ResizeReport",
    ),
    "_analysis.api": ("analyze", "compare"),
    "_analysis.results": ("AdapterAnalysis", "Comparison"),
    "_analysis.records": (
        "EntryStatistics",
        "Finding",
        "Histogram",
        "ModuleAnalysis",
        "ModuleComparison",
        "PairComparison",
        "TensorStatistics",
    ),
    "_convert.api": ("convert",),
    "_convert.report": ("ConversionReport",),
    "_fleet.difference": ("AdapterChange", "FindingChange", "ScanDiff", "scan_diff"),
    "_fleet.discovery": ("ScanError",),
    "_fleet.findings": ("FleetFinding",),
    "_fleet.fleet": ("Fleet",),
    "_fleet.scan": ("scan",),
    "_merge.api": ("merge", "open_merged", "plan", "subtract", "verify"),
    "_merge.inspect": ("inspect",),
    "_merge.listing": ("AdapterListing", "CheckpointListing"),
    "_merge.plan": ("MergePlan", "PlanPart", "WrittenShard"),
    "_merge.planned": ("PlannedTensor", "Update"),
    "_merge.clean": ("clean",),
    "_merge.recover": ("recover",),
    "_merge.report": ("MergeReport",),
    "_merge.subtract": ("SubtractReport",),
    "_merge.verify": ("Verification",),
    "_merge.view": ("MergedSlice", "MergedView"),
    "_similarity.api": ("similarity",),
    "_similarity.duplicates": ("DuplicateGroup", "Duplicates", "Evidence", "duplicates"),
    "_similarity.lineage": ("Lineage", "lineage"),
    "_similarity.similarity": ("Similarity",),
    "_similarity.trajectory": ("Checkpoint", "Trajectory", "trajectory"),
    # NeuroTrain's names, for scripts that change one import; they are no part of `__all__`.
    "analyzers": (
        "LoRAAnalyzer",
        "UnifiedAnalyzer",
        "analyze_lora_weights",
        "compare_lora_adapters",
        "merge_lora_adapters",
    ),
}

# Public modules, which are there without an import of their own.
_SUBMODULES = ("analyzers", "errors", "torch")

# Unseen by type checkers, for which the imports above are the truth: a name that is not among them
# is an error to them.
if not TYPE_CHECKING:

    def _adopt(value):
        """Put the home of a public name here: what users see, and what a pickle names."""
        if getattr(value, "__module__", "").startswith("lorafast._"):
            value.__module__ = "lorafast"
        return value

    def __getattr__(name):
        from importlib import import_module

        if name in _SUBMODULES:
            return import_module(f"lorafast.{name}")
        for home, names in _HOMES.items():
            if name in names:
                module = import_module(f"lorafast.{home}")
                for each in names:
                    globals().setdefault(each, _adopt(getattr(module, each)))
                return globals()[name]
        raise AttributeError(f"module 'lorafast' has no attribute {name!r}", name=name)

    def __dir__():
        return sorted({*globals(), *__all__, *_SUBMODULES})

    for _name in __all__:
        _adopt(globals().get(_name))
    del _name

del TYPE_CHECKING
