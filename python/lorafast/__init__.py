"""Merge LoRA adapters into safetensors checkpoints, and measure what adapters hold.

`merge` writes `W + s·B·A` for every weight that an adapter updates, file to file, without loading
the model; `plan` says beforehand what it would do, `verify`
afterwards whether it was done right; `inspect` lists what a file holds.
"""

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
from lorafast._merge import MergePlan, MergeReport, inspect, merge, plan
from lorafast._verify import Verification, verify

__all__ = [
    "AdapterError",
    "CheckpointError",
    "LorafastError",
    "MergePlan",
    "MergeReport",
    "MissingDependencyError",
    "NumericError",
    "OutputError",
    "PlanError",
    "UnsupportedAdapterError",
    "Verification",
    "VerificationError",
    "__version__",
    "build_info",
    "inspect",
    "merge",
    "plan",
    "verify",
]

# Users see, and pickle, the public names.
for _name in __all__:
    _value = globals()[_name]
    if getattr(_value, "__module__", "").startswith("lorafast._"):
        _value.__module__ = "lorafast"
del _name, _value
