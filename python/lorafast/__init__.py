"""Merge LoRA adapters into safetensors checkpoints, and measure what adapters hold.

`merge` writes `W + s·B·A` for every weight that an adapter updates, file to file, without loading
the model; `plan` says beforehand what it would do, `verify` afterwards whether it was done right,
and `subtract` undoes it; `inspect` lists what a file holds. `analyze` measures an adapter,
`compare` several of them. `LoRAAnalyzer` and its relatives in `lorafast.analyzers` do the same
under the names of NeuroTrain's tools.
"""

from lorafast._analysis import analyze, compare
from lorafast._core import __version__, build_info
from lorafast._errors import (
    AdapterError,
    CheckpointError,
    LorafastError,
    MissingDependencyError,
    NumericError,
    OutputError,
    PlanError,
    UnsupportedAdapterError,
    VerificationError,
)
from lorafast._fleet._duplicates import DuplicateGroup, Duplicates, Evidence, duplicates
from lorafast._fleet._fleet import Fleet, FleetFinding
from lorafast._fleet._lineage import Lineage, lineage
from lorafast._fleet._paths import ScanError
from lorafast._fleet._scan import scan
from lorafast._fleet._similarity import Similarity, similarity
from lorafast._fleet._trajectory import Checkpoint, Trajectory, trajectory
from lorafast._merge import MergePlan, MergeReport, inspect, merge, plan
from lorafast._records import (
    AdapterAnalysis,
    Comparison,
    EntryStatistics,
    Finding,
    Histogram,
    ModuleAnalysis,
    ModuleComparison,
    PairComparison,
    TensorStatistics,
)
from lorafast._subtract import SubtractReport, subtract
from lorafast._verify import Verification, verify
from lorafast.analyzers import (
    LoRAAnalyzer,
    UnifiedAnalyzer,
    analyze_lora_weights,
    compare_lora_adapters,
    merge_lora_adapters,
)

__all__ = [
    "AdapterAnalysis",
    "AdapterError",
    "Checkpoint",
    "CheckpointError",
    "Comparison",
    "DuplicateGroup",
    "Duplicates",
    "EntryStatistics",
    "Evidence",
    "Finding",
    "Fleet",
    "FleetFinding",
    "Histogram",
    "Lineage",
    "LoRAAnalyzer",
    "LorafastError",
    "MergePlan",
    "MergeReport",
    "MissingDependencyError",
    "ModuleAnalysis",
    "ModuleComparison",
    "NumericError",
    "OutputError",
    "PairComparison",
    "PlanError",
    "ScanError",
    "Similarity",
    "SubtractReport",
    "TensorStatistics",
    "Trajectory",
    "UnifiedAnalyzer",
    "UnsupportedAdapterError",
    "Verification",
    "VerificationError",
    "__version__",
    "analyze",
    "analyze_lora_weights",
    "build_info",
    "compare",
    "compare_lora_adapters",
    "duplicates",
    "inspect",
    "lineage",
    "merge",
    "merge_lora_adapters",
    "plan",
    "scan",
    "similarity",
    "subtract",
    "trajectory",
    "verify",
]

# Users see, and pickle, the public names.
for _name in __all__:
    _value = globals()[_name]
    if getattr(_value, "__module__", "").startswith("lorafast._"):
        _value.__module__ = "lorafast"
del _name, _value
