"""Taking adapters out of a merged checkpoint again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from lorafast import _core
from lorafast._errors import OutputError, VerificationError
from lorafast._io.hub import require_directory
from lorafast._io.limits import check_threads
from lorafast._io.paths import is_directory, resolved
from lorafast._io.plain import fields_of
from lorafast._io.progress import callback
from lorafast._io.sources import BASE_PATTERNS, as_list, locate, require_readers
from lorafast._merge.plan import MergePlan, make_plan
from lorafast._merge.report import AFTERWARDS, OutputReport, unmeasured, write_afterwards
from lorafast._merge.verify import verify_plan
from lorafast._results import RecordDict, RecordList

if TYPE_CHECKING:
    from lorafast._core import Coverage
    from lorafast._merge.options import Combination, ExecutionOptions
    from lorafast._merge.report import MergeReport
    from lorafast._types import Source

#: From this share of the change on, what rounding can have done is worth a warning.
LOST = 0.5


@dataclass(frozen=True, repr=False)
class SubtractReport(OutputReport):
    """What a subtraction gave back, and how near that is to the base.

    Attributes:
        merged: path of the merged checkpoint.
        adapters: paths of the adapters that were taken out, in the order of the merge.
        original: path of the base, where it was at hand.
        strategy: how the adapters had been combined.
        weights: the weight each had, or `None` under sequential.
        output_path: the directory that was written.
        dtype: auto, or the dtype of the output's floating-point tensors.
        exact: whether the output is the base, byte for byte (converted, where `dtype` says so).
        bound: where it is not, and that could be measured: `largest`, what no weight lies further
            from the base's than; `norm`, the root of the sum of squares of every weight's bound;
            `change`, ‖merged - output‖;
            `share`, norm over change; `tensors`, out of how many something was taken; `rounding`,
            how the merge is taken to have rounded: "once", or "as PEFT does" with compat="peft".
            Once: |R - W| ≤ ½ulp(M) + ½ulp(R) + the bound of two float32 sums (Higham, "Accuracy and
            Stability of Numerical Algorithms", §3.1).
        proof: with the base at hand, what `lorafast.verify` found of the merged checkpoint.
        verification: with `verify`, what it found of the output.
        tensors_changed: tensors out of which something was taken.
        bytes_written: bytes of the output's shards.
        seconds: of writing.
        threads: worker threads.
        versions: of lorafast.
        adapter_sha256: of each adapter's weights file, by the adapter's path.
        coverage: for each adapter what became of every config field, tensor and file of weights.
        warnings: what to know before using the result.
        notes: how adapters were made to fit where it was not plain.
        side_files: files carried over beside the weights.
        left_out: what was not carried over, as in a merge's report.
    """

    _name: ClassVar[str] = "subtract_report"

    merged: str
    adapters: list[str]
    original: str | None
    strategy: str
    weights: list[float | dict[str, float]] | None
    output_path: str
    dtype: str
    exact: bool
    bound: dict[str, Any] | None
    proof: dict[str, Any] | None
    verification: dict[str, Any] | None
    tensors_changed: int
    bytes_written: int
    seconds: float
    threads: int
    versions: dict[str, str]
    adapter_sha256: dict[str, str]
    coverage: list[Coverage]
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    side_files: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def _fields_now(self) -> Iterable[tuple[str, Any]]:
        return vars(self).items()

    def _paths(self) -> list[str]:
        base = [] if self.original is None else [self.original]
        return [self.merged, *base, *self.adapters, self.output_path]

    def __post_init__(self) -> None:
        for name in ("proof", "verification"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else RecordDict(value))
        for name in ("coverage", "side_files", "left_out"):
            object.__setattr__(self, name, RecordList(getattr(self, name)))

    def exactness(self) -> str:
        """How near the result is to the base, in words."""
        if not self.exact and self.bound is None:
            return "the base to within rounding; how near could not be measured"
        if self.bound is None:
            converted = "" if self.dtype == "auto" else f", converted to {self.dtype}"
            return (
                f"the base, byte for byte{converted}: the merged model was proved to be what "
                "it and the adapters make"
            )
        share = f"{self.bound['share']:.2%}" if self.bound["change"] > 0 else "nothing"
        return (
            f"the base to within rounding: no weight is further from it than "
            f"{self.bound['largest']:.3g}, and all together not further than {share} of the change "
            f"that was taken out, if the merge rounded each weight {self.bound['rounding']}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain objects."""
        return fields_of(self)


def subtract_adapters(
    merged: Source,
    adapters: Source | Sequence[Source],
    output: Source,
    *,
    original: Source | None,
    options: Combination,
    execution: ExecutionOptions,
) -> SubtractReport:
    """`lorafast.subtract`, with its options as the two objects that they are in."""
    check_threads(execution.threads)
    output = require_directory(output)
    dtype = options.to_core()["dtype"]
    proof = None
    require_readers(merged, *as_list(adapters), original)
    prepared = make_plan(
        merged if original is None else original,
        adapters,
        options if original is None else options._replace(dtype="auto"),
        subtract=original is None,
    )
    plan = prepared
    if original is not None:
        _check_place(merged, output)
        proof = verify_plan(prepared, merged, execution)
        if not proof.ok:
            raise VerificationError(
                f"{os.fspath(merged)}: is not what {os.fspath(original)} and the adapters make: "
                f"{proof.problems[0]}; give the strategy, the weights and all the adapters that it "
                "was merged with, or leave the original out to subtract all the same"
            )
        plan = MergePlan(prepared.core.of_base_alone(dtype=dtype))
        plan.protected = [locate(merged, BASE_PATTERNS)]
    with plan.carried_out(output, execution) as done:
        bound = None if original is not None else _bound(plan, done, options, execution)
        result = SubtractReport(
            merged=os.fspath(merged),
            proof=None if proof is None else proof.to_dict(),
            bound=bound,
            **_shared_fields(done, prepared, exact=original is not None),
        )
        if bound is not None and bound["share"] >= LOST:
            result.warnings.append(
                f"rounding can account for {bound['share']:.0%} of the change that was taken out; "
                "give the base that it was merged into as well (original=…, --base) to get it back "
                "exactly"
            )
        if execution.report:
            write_afterwards(result, output)
    return result


def _bound(
    plan: MergePlan, done: MergeReport, options: Combination, execution: ExecutionOptions
) -> dict[str, Any] | None:
    """How far what was written can lie from the base, where that can be measured."""
    try:
        with callback(execution.progress, label="measuring") as tell:
            distance = plan.core.distance(
                done.output_path, threads=execution.threads, progress=tell
            )
    except AFTERWARDS as error:
        # The output is written; only how near it is to the base is not known.
        done.warnings.append(unmeasured(done.output_path, error))
        return None
    return {
        **distance,
        "rounding": "once" if options.compat is None else "as PEFT does",
        "share": distance["norm"] / distance["change"] if distance["change"] > 0 else 0.0,
    }


def _shared_fields(done: MergeReport, prepared: MergePlan, *, exact: bool) -> dict[str, Any]:
    """The fields that a merge's report has too."""
    description = prepared.to_dict()
    return {
        "adapters": done.adapters,
        "original": prepared.base if exact else None,
        "strategy": description["strategy"],
        "weights": description["weights"],
        "output_path": done.output_path,
        "dtype": done.dtype,
        "exact": exact,
        "verification": done.verification,
        "tensors_changed": prepared.tensors_merged,
        "bytes_written": done.bytes_written,
        "seconds": done.merge_time,
        "threads": done.threads,
        "versions": {"lorafast": _core.__version__},
        "adapter_sha256": done.adapter_sha256,
        "coverage": [adapter["coverage"] for adapter in description["adapters"]],
        "warnings": done.warnings,
        "notes": [] if exact else list(prepared.notes),
        "side_files": done.side_files,
        "left_out": done.left_out,
    }


def _check_place(merged: Source, output: Source) -> None:
    """Refuses to write over the merged checkpoint, which the proof reads and no plan protects."""
    own = resolved(locate(merged, BASE_PATTERNS))
    place = resolved(output)
    whole = is_directory(own)
    if place == (own if whole else own.parent):
        raise OutputError(f"{output}: is the merged model itself; give another directory")
    if whole and own in place.parents:
        raise OutputError(
            f"{output}: lies inside the merged model {merged}; give another directory"
        )
