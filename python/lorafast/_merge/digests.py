"""Proof of an exact merge by the digests that its report has, without the merged model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorafast import _core
from lorafast._io.progress import callback
from lorafast._merge.plan import make_plan
from lorafast._merge.verify import Verification

if TYPE_CHECKING:
    from lorafast._merge.options import Combination, ExecutionOptions
    from lorafast._types import Source

#: Where a merge leaves the digests of its shards.
REPORT = "merge_report.json"


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
