"""The errors that lorafast raises, all of them kinds of `LorafastError`."""

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

__all__ = [
    "AdapterError",
    "CheckpointError",
    "DeviceError",
    "LorafastError",
    "MissingDependencyError",
    "NumericError",
    "OutputError",
    "PlanError",
    "StoreError",
    "TensorNotFoundError",
    "UnsupportedAdapterError",
    "VerificationError",
    "WorkerError",
]
