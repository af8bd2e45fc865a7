"""Proof that a merged checkpoint is what base and adapters make."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorafast._io.progress import callback
from lorafast._io.sources import BASE_PATTERNS, locate

if TYPE_CHECKING:
    from lorafast._merge.api import Compat, ExpertLayout, MergePlan, Progress, Source, Strategy


@dataclass(frozen=True)
class Verification:
    """What a verification found.

    Attributes:
        problems: what is wrong, in the order of the checkpoint; each names a tensor or a file and
            says how it differs. Empty means proved.
        warnings: what is odd but not wrong, such as a change that rounding mostly took away.
        tensors_copied: tensors compared byte for byte with the base.
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
    tensors_merged: int
    rows_exact: int
    elements: int
    lost: float
    unmoved: float
    rounding: list[dict[str, Any]]
    adapters: list[dict[str, Any]]
    untouched: list[dict[str, str]]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Every field, and `ok`, as plain objects."""
        return {"ok": self.ok, **asdict(self)}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __repr__(self) -> str:
        verdict = "ok" if self.ok else f"{len(self.problems)} problems: {self.problems[0]}"
        return (
            f"<Verification: {verdict}; {self.tensors_merged} tensors computed again, "
            f"{self.tensors_copied} compared>"
        )


def verify(
    base: Source,
    adapters: Source | Sequence[Source],
    merged: Source,
    *,
    strategy: Strategy = "sequential",
    weights: Sequence[float] | None = None,
    full: bool = False,
    threads: int | None = None,
    progress: Progress = False,
    allow: str | Sequence[str] = (),
    compat: Compat | None = None,
    expert_layout: ExpertLayout = "auto",
    device: str = "cpu",
) -> Verification:
    """Checks a merged checkpoint, whoever made it, against what base and adapters make.

    Tensors that no adapter touches must be the base's, byte for byte. Every merged weight is
    computed again, and must lie within half a unit in the last place of its dtype around the
    exact value, widened by the bound on a float32 sum (n·2⁻²⁴·Σ|terms|; Higham, "Accuracy and
    Stability of Numerical Algorithms", §3.1), so that any order of summation passes. Index,
    config and tied weights must agree with the tensors. How the checkpoint is cut into shards does
    not matter, nor does a prefix before all names, nor whether a tied head is written out. A merged
    checkpoint in another dtype than the base's is held against its own dtype.

    Args:
        base: as for `lorafast.merge`.
        adapters: as for `lorafast.merge`.
        merged: the merged checkpoint: a directory or a `.safetensors` file.
        strategy: how the adapters were combined.
        weights: the adapters' weights, for "weighted".
        full: compute every row of the merged tensors in float64 as well, not a seeded sample.
        threads: worker threads; one per core if missing.
        progress: as for `lorafast.merge`.
        allow: as for `lorafast.merge`.
        compat: as for `lorafast.merge`; "peft" for what PEFT itself merged, which also lets pass
            that PEFT rounds 16-bit weights more than once for some layers and several adapters.
        expert_layout: as for `lorafast.merge`.
        device: where the merge was made. "cpu:amx" lets pass, for 16-bit weights, what AMX's
            products are off (2⁻¹⁵ of their size); all others are held against the same bound.

    Returns:
        What was found; `.ok` says whether anything is wrong.

    Raises:
        FileNotFoundError: something is not there.
        LorafastError: base or adapters are broken or do not fit together, as for
            `lorafast.merge`. What is wrong with `merged` is a problem in the result instead.
    """
    from lorafast._io.device_names import check_merge_name
    from lorafast._io.limits import check_threads
    from lorafast._merge.api import plan

    check_threads(threads)
    check_merge_name(device)
    prepared = plan(
        base,
        adapters,
        strategy=strategy,
        weights=weights,
        allow=allow,
        expert_layout=expert_layout,
        compat=compat,
    )
    return verify_plan(
        prepared, merged, device=device, full=full, threads=threads, progress=progress
    )


def verify_plan(
    prepared: MergePlan,
    merged: Source,
    *,
    device: str,
    full: bool,
    threads: int | None,
    progress: Progress,
) -> Verification:
    """`verify` for a merge that is planned already."""
    from lorafast._io.device_names import AMX

    path = locate(merged, BASE_PATTERNS)
    with callback(progress, label="verifying") as report:
        outcome = prepared.core.verify(
            path, threads=threads, full=full, split=device == AMX, progress=report
        )
    return Verification(**outcome)
