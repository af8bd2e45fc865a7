"""Proof that a merged checkpoint is what base and adapters make."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafast._io.plain import fields_of
from lorafast._io.progress import callback
from lorafast._io.sources import BASE_PATTERNS, find_source
from lorafast._results import RecordList, Result

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorafast import _core
    from lorafast._merge.options import Combination, ExecutionOptions
    from lorafast._merge.workers import Planned
    from lorafast._types import Source


#: Where a merge leaves the digests of its shards.
REPORT = "merge_report.json"


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


def verify_digests(
    base: Source | None,
    adapters: Source | Sequence[Source],
    report: Source,
    options: Combination,
    execution: ExecutionOptions,
) -> Verification:
    """`verify` of an exact merge of which nothing but the digests in its report is at hand.

    Args:
        base: as for `lorafast.verify`.
        adapters: likewise.
        report: `merge_report.json`, or the directory that holds it.
        options: how the adapters were combined; the dtype is the report's.
        execution: for threads and progress.

    Raises:
        FileNotFoundError: there is no such report.
        ValueError: the report is not one of an exact merge.
    """
    from lorafast import _core
    from lorafast._merge.plan import make_plan

    path = Path(os.fspath(report))
    path = path / REPORT if path.is_dir() else path
    told, dtype = _digests_in(path)
    plan = make_plan(base, adapters, options._replace(precision="exact", dtype=dtype))
    view = _core.open_view(plan.core, threads=execution.threads)
    try:
        with callback(execution.progress, label="verifying") as tell:
            found = view.shard_digests(progress=tell)
    finally:
        view.close()
    problems = []
    for name in sorted({*told, *found}):
        if name not in found:
            problems.append(f"{name}: the report has a shard that the merge does not make")
        elif name not in told:
            problems.append(f"{name}: the merge makes a shard of which the report has no digest")
        elif told[name] != found[name]:
            problems.append(
                f"{name}: its SHA-256 is {told[name]} in the report and {found[name]} of what base "
                "and adapters make; one of them, or how they are combined, is another than in the "
                "merge"
            )
    return Verification(
        problems=problems,
        warnings=list(plan.warnings),
        tensors_copied=plan.tensors_copied + plan.tensors_cast,
        tensors_replaced=plan.tensors_replaced + plan.tensors_repeated,
        tensors_merged=plan.tensors_merged,
        rows_exact=0,
        elements=plan.total_parameters,
        lost=0.0,
        unmoved=0.0,
        rounding=[],
        adapters=[],
        untouched=[],
    )


def _digests_in(path: Path) -> tuple[dict[str, str], str]:
    """The digests of the shards in a report, and the dtype of the merge."""
    try:
        report = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: there is no such report; give the merge_report.json of an exact merge"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error})") from None
    digests = report.get("shard_sha256") if isinstance(report, dict) else None
    dtype = report.get("dtype") if isinstance(report, dict) else None
    is_told = isinstance(digests, dict) and all(isinstance(each, str) for each in digests.values())
    if not is_told or not digests or not isinstance(dtype, str):
        raise ValueError(
            f"{path}: has no digests of shards, which only an exact merge into a directory writes "
            '(precision="exact", --precision exact)'
        )
    return digests, dtype


# What users see, and what a pickle names.
Verification.__module__ = "lorafast"
