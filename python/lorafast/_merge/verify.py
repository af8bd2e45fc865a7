"""Proof that a merged checkpoint is what base and adapters make."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorafast._io.plain import fields_of
from lorafast._io.progress import callback
from lorafast._io.sources import BASE_PATTERNS, find_source
from lorafast._results import RecordList, Result

if TYPE_CHECKING:
    from lorafast import _core
    from lorafast._merge.options import ExecutionOptions
    from lorafast._merge.workers import Planned
    from lorafast._types import Source


@dataclass(frozen=True, repr=False)
class Verification(Result):
    """What a verification found.

    Attributes:
        problems: what is wrong, in the order of the checkpoint; each names a tensor or a file and
            says how it differs. Empty means proved.
        warnings: what is odd but not wrong, such as a change that rounding mostly took away.
        tensors_copied: tensors compared with the base's, byte for byte or converted.
        tensors_replaced: tensors compared with what an adapter, or another tensor of the base, puts
            in their place.
        tensors_merged: tensors computed again.
        rows_exact: rows of them computed again in float64.
        elements: elements compared in all.
        lost: ‖stored − exact‖ / ‖exact − W₀‖ over the rows computed in float64: the share of the
            adapters' change that rounding to the output's dtype took away.
        unmoved: share of the weights there that should move and did not.
        rounding: for each merged tensor its name, `lost` and `unmoved`.
        adapters: the same for each adapter, over the tensors that it changes: `lost` is
            ‖stored - exact‖ / ‖w·Δ‖ with its own change alone.
        untouched: for each tensor that is the base's byte for byte its name and SHA-256.
    """

    problems: list[str]
    warnings: list[str]
    tensors_copied: int
    tensors_replaced: int
    tensors_merged: int
    rows_exact: int
    elements: int
    lost: float
    unmoved: float
    rounding: list[_core.Rounding]
    adapters: list[_core.AdapterRounding]
    untouched: list[_core.Untouched]

    def __post_init__(self) -> None:
        for name in ("problems", "warnings", "rounding", "adapters", "untouched"):
            object.__setattr__(self, name, RecordList(getattr(self, name)))

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Every field, and `ok`, as plain objects."""
        return {"ok": self.ok, **fields_of(self)}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)


def verify_plan(
    plan: Planned,
    merged: Source | _core.StoreLocation,
    execution: ExecutionOptions,
    *,
    full: bool = False,
) -> Verification:
    """`verify` for a merge that is planned already."""
    from lorafast._io.device_names import AMX

    path = find_source(merged, BASE_PATTERNS)
    with callback(execution.progress, label="verifying") as report:
        split = execution.device == AMX
        if execution.executor is None:
            outcome = plan.core.verify(
                path, threads=execution.threads, full=full, split=split, progress=report
            )
        else:
            from lorafast._merge.workers import verified

            outcome = verified(plan, path, execution, full=full, split=split, progress=report)
    return Verification(**outcome)


# What users see, and what a pickle names.
Verification.__module__ = "lorafast"
