"""Equivalent adapters, one update in different parameterizations: `lorafast.duplicates`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from lorafast._analysis.names import position_of
from lorafast._fleet.discovery import ScanError
from lorafast._io.plain import to_plain
from lorafast._io.progress import pace
from lorafast._results import FramedResult, RecordList, shown
from lorafast._similarity.candidates import TRUNCATION_SLACK, Signature, candidates
from lorafast._similarity.collection import Adapters, Collected, apart, collected, families
from lorafast._types import Progress, Source
from lorafast._words import agree, plural

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from lorafast import _core

Tier = Literal["same_bytes", "same_tensors", "zero_update", "same_update", "scaled", "truncated"]

#: From the closest to the loosest, with what each says.
TIERS: dict[Tier, str] = {
    "same_bytes": "the same weights file, with the same scales",
    "same_tensors": "the same tensors under another header",
    "zero_update": "a low-rank update of zero on the same base, and all else the same",
    "same_update": "the same ΔW: other factors, scale in the factors, or another dtype",
    "scaled": "the same ΔW times a number",
    "truncated": "the leading singular values of the same ΔW",
}
#: Below this share of the norm, two updates are the same whatever they are stored in.
FLOOR = 1e-12


@shown
@dataclass(frozen=True)
class Evidence:
    """What makes an adapter one of its group.

    Attributes:
        path: the adapter.
        text: the evidence in words; X is the group's first member, Y this one.
        figures: the numbers in it: `difference` (relative to ‖Y‖), `tolerance` (what rounding
            explains, likewise), `factor` (Y = factor·X), `kept` (‖X_k‖²/‖X‖²), or `sha256`.
    """

    path: Path
    text: str
    figures: dict[str, float | str]


@shown
@dataclass(frozen=True)
class DuplicateGroup:
    """Adapters that are one update.

    An adapter is in the group of the closest tier that applies. What the first member of a group
    stands for in looser tiers holds for all: the others are not repeated there.

    Attributes:
        tier: how close they are; `lorafast.duplicates` has the list.
        members: the adapters, the one to keep first: the most precise, or of truncations the
            whole.
        names: their names.
        evidence: what makes each of the others a member.
    """

    tier: Tier
    members: list[Path]
    names: list[str]
    evidence: list[Evidence]


@dataclass(frozen=True, repr=False)
class Duplicates(FramedResult, Sequence[DuplicateGroup]):
    """The groups that were found: a sequence, the closest tiers first.

    Attributes:
        groups: the groups.
        names: a distinct name for each adapter that could be read.
        paths: where each lies.
        errors: what could not be read, each with its path and the reason.
        notes: what could not be compared.
    """

    groups: list[DuplicateGroup]
    names: list[str]
    paths: list[Path]
    errors: list[ScanError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    _kind = "duplicates"

    def __post_init__(self) -> None:
        for name in ("groups", "names", "paths", "errors", "notes"):
            object.__setattr__(self, name, RecordList(getattr(self, name)))

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> DuplicateGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[DuplicateGroup]: ...
    def __getitem__(self, index: int | slice) -> DuplicateGroup | list[DuplicateGroup]:
        return self.groups[index]

    def __iter__(self) -> Iterator[DuplicateGroup]:
        return iter(self.groups)

    def group_of(self, adapter: Source) -> DuplicateGroup | None:
        """The closest group that an adapter is in, if it is in one.

        Args:
            adapter: its name or its path.

        Raises:
            KeyError: there is no such adapter.
        """
        path = self.paths[position_of(adapter, self.names, self.paths)]
        return next((group for group in self.groups if path in group.members), None)

    @property
    def redundant(self) -> int:
        """How many adapters would be left out if only the first of each group were kept."""
        return len({path for group in self.groups for path in group.members[1:]})

    def _plain(self) -> dict[str, Any]:
        return {
            "adapters": len(self.names),
            "groups": [
                {
                    "tier": group.tier,
                    "meaning": TIERS[group.tier],
                    "members": to_plain(group.members),
                    "names": group.names,
                    "evidence": to_plain(group.evidence),
                }
                for group in self.groups
            ],
            "errors": to_plain(self.errors),
            "notes": to_plain(self.notes),
        }


def duplicates(
    adapters: Adapters, *, threads: int | None = None, progress: Progress = False
) -> Duplicates:
    """Groups adapters that are the same update, whatever it is written in.

    The tiers, from the closest to the loosest:

    - `same_bytes`: the weights files are the same to the byte, and the configs give the same
      scales.
    - `same_tensors`: the same tensors in another order, with other metadata, or under other names
      of the same modules (another prefix, another release of transformers).
    - `zero_update`: ΔW is zero, on the same base. A base is known by the last part of the name that
      `adapter_config.json` gives it, and by the shapes of what is updated; of different bases
      not even copies of an update of zero are one.
    - `same_update`: the same ΔW in other factors (B·G, G⁻¹·A), with alpha moved into the factors,
      or in another dtype.
    - `scaled`: Y = c·X for one number c.
    - `truncated`: Y is X with only its leading singular values in every module, up to a number.

    Two updates are the same where ‖X − Y‖ is no more than rounding explains: for independent
    errors of ulp²/12 in the stored factors, E‖δ(s·B·A)‖² follows from the factors, and twice
    its root is allowed for 16-bit factors, 64 times for longer ones, whose arithmetic counts as
    well (four times that for truncations). So the threshold is relative, is finer for float32
    than for bfloat16, and grows for badly conditioned factorisations as their errors do; every
    group's evidence has the difference and the threshold. What the adapters do beside low-rank
    updates (magnitudes, biases, saved modules) has to be the same too.

    Candidates are found by the leading singular values of every module, which none of this
    changes by more (Mirsky's inequality); each is then confirmed on the factors. Every adapter is
    read once for that, and those that have a candidate again.

    Args:
        adapters: directories, which are searched; adapters; globs; any number of these; or a
            fleet.
        threads: worker threads; one for each core if `None`.
        progress: `True` for a bar on a terminal or in a notebook, or a callable that is given
            (done, total) bytes.

    Returns:
        The groups, the closest tiers first. Adapters that cannot be read are in `errors`.

    Raises:
        ValueError: an argument is outside its domain, or no path was given.
        FileNotFoundError: no path is there.
        AdapterError: no adapter can be read, or one was changed meanwhile.
    """
    found = collected(adapters, threads, progress)
    return _Search(found, threads).run(progress)


class _Search:
    """One call of `duplicates`."""

    def __init__(self, found: Collected, threads: int | None) -> None:
        self.found = found
        self.threads = threads
        self.groups: list[DuplicateGroup] = []
        self.signatures: dict[int, Signature] = {}
        self.leading: dict[int, NDArray[numpy.float64]] = {}
        self.known: dict[tuple[int, int], _core.Relation] = {}
        self.errors = list(found.errors)
        #: Of each adapter the number of its base.
        self.bases = {
            at: number
            for number, (_, members) in enumerate(found.core.groups(False))
            for at in members
        }

    def run(self, progress: Progress) -> Duplicates:
        self._sign(progress)
        classes = self._same_digest(list(self.signatures), "same_bytes", lambda own: own.file)
        classes = self._same_digest(classes, "same_tensors", lambda own: own.tensors)
        odd = [at for at in classes if not self.signatures[at].is_finite]
        classes = [at for at in classes if self.signatures[at].is_finite]
        zero = [at for at in classes if self.signatures[at].norm == 0]
        self._stars(zero, self._of_one_base(zero), "zero_update", self._zero, self._by_precision)
        classes = [at for at in classes if self.signatures[at].norm > 0]
        edges = candidates(classes, self.signatures, self.leading)
        classes = self._stars(classes, edges, "same_update", self._same_update, self._by_precision)
        classes = self._stars(classes, edges, "scaled", self._scaled, self._by_precision)
        self._stars(classes, edges, "truncated", self._truncated, self._by_rank)
        notes = apart(self.found, families(self.found))
        if odd:
            names = ", ".join(self.found.names[at] for at in odd[:3])
            notes.append(
                f"{plural(len(odd), 'adapter')} {agree(len(odd), 'holds', 'hold')} NaN or infinity "
                f"and {agree(len(odd), 'was', 'were')} compared byte by byte only "
                f"({names}{', …' if len(odd) > 3 else ''})"
            )
        return Duplicates(self.groups, self.found.names, self.found.paths, self.errors, notes)

    def _sign(self, progress: Progress) -> None:
        import numpy as np

        count = len(self.found.names)
        with pace(progress, "reading", count, "adapters", is_bytes=True) as report:
            signed = self.found.core.signatures(range(count), threads=self.threads, progress=report)
        for at, (plain, leading) in enumerate(signed):
            if isinstance(plain, Exception):
                self.errors.append(ScanError(self.found.paths[at], str(plain)))
                continue
            self.signatures[at] = Signature(position=at, **plain)
            self.leading[at] = np.frombuffer(leading, dtype="<f8")

    def _add(self, tier: Tier, members: list[int], evidence: list[Evidence]) -> None:
        paths = [self.found.paths[at] for at in members]
        names = [self.found.names[at] for at in members]
        self.groups.append(DuplicateGroup(tier, paths, names, evidence))

    def _same_digest(
        self, classes: list[int], tier: Tier, digest_of: Callable[[Signature], str]
    ) -> list[int]:
        """Groups what has one digest and the same scales; returns the first of each."""
        by_digest: dict[tuple[str, str, int], list[int]] = {}
        for at in classes:
            own = self.signatures[at]
            # What changes nothing says nothing but which base it is for.
            base = self.bases[at] if own.changes_nothing else -1
            by_digest.setdefault((digest_of(own), own.scales, base), []).append(at)
        for (digest, *_), members in by_digest.items():
            if len(members) > 1:
                what = "weights files" if tier == "same_bytes" else "tensors"
                text = f"the {what} have the SHA-256 {digest[:16]}…, and the scales are the same"
                evidence = [
                    Evidence(self.found.paths[at], text, {"sha256": digest}) for at in members[1:]
                ]
                self._add(tier, members, evidence)
        return [members[0] for members in by_digest.values()]

    def _of_one_base(self, classes: list[int]) -> dict[int, set[int]]:
        """For each adapter the others of its base."""
        members: dict[int, set[int]] = {}
        for at in classes:
            members.setdefault(self.bases[at], set()).add(at)
        return {at: members[self.bases[at]] - {at} for at in classes}

    def _stars(
        self,
        classes: list[int],
        edges: dict[int, set[int]],
        tier: Tier,
        judge: Callable[[int, int], Evidence | None],
        order: Callable[[int], tuple[int, ...]],
    ) -> list[int]:
        """Compares candidates with the best among them, group after group; returns the firsts."""
        remaining = set(classes)
        dropped: set[int] = set()
        while True:
            stars = []
            for component in _components(remaining, edges):
                if len(component) > 1:
                    centre = min(component, key=order)
                    others = sorted(edges[centre] & component)
                    stars.append((centre, others))
            if not stars:
                return [at for at in classes if at not in dropped]
            self._relate([(centre, other) for centre, others in stars for other in others])
            for centre, others in stars:
                evidence = {other: judge(centre, other) for other in others}
                members = [other for other in others if evidence[other] is not None]
                if members:
                    found = [item for item in evidence.values() if item is not None]
                    self._add(tier, [centre, *members], found)
                remaining -= {centre, *members}
                dropped.update(members)

    def _relate(self, pairs: list[tuple[int, int]]) -> None:
        new = [pair for pair in pairs if pair not in self.known]
        if new:
            found = self.found.core.relations(new, threads=self.threads, progress=None)
            self.known.update(zip(new, found, strict=True))

    def _by_precision(self, at: int) -> tuple[int, ...]:
        return self.signatures[at].coarseness, at

    def _by_rank(self, at: int) -> tuple[int, ...]:
        own = self.signatures[at]
        return -own.rank, own.coarseness, at

    def _tolerance(self, x: int, y: int, factor: float) -> float:
        import math

        x_signature, y_signature = self.signatures[x], self.signatures[y]
        rounding = math.hypot(factor * x_signature.tolerance, y_signature.tolerance)
        return rounding + FLOOR * y_signature.norm

    def _zero(self, x: int, y: int) -> Evidence | None:
        if self.known[x, y]["other_difference"] is not None:
            return None
        text = "both updates are zero, and change nothing"
        if not self.signatures[y].changes_nothing:
            # As of an adapter that has saved modules alone, or magnitudes.
            text = "both low-rank updates are zero, and what they do beside them is the same"
        return Evidence(self.found.paths[y], text, {"difference": 0.0})

    def _same_update(self, x: int, y: int) -> Evidence | None:
        relation = self.known[x, y]
        if relation["other_difference"] is not None:
            return None
        path, norm = self.found.paths[y], relation["norms"][1]
        tolerance = self._tolerance(x, y, 1.0)
        if not relation["difference"] <= tolerance:
            return None
        figures: dict[str, float | str] = {
            "difference": relation["difference"] / norm,
            "tolerance": tolerance / norm,
        }
        return Evidence(path, f"‖X − Y‖/‖Y‖ = {_rounding(figures)}", figures)

    def _scaled(self, x: int, y: int) -> Evidence | None:
        relation = self.known[x, y]
        norm, factor = relation["norms"][1], relation["factor"]
        if relation["other_difference"] is not None or not norm > 0:
            return None
        tolerance = self._tolerance(x, y, factor)
        if not relation["scaled_difference"] <= tolerance:
            return None
        figures: dict[str, float | str] = {
            "factor": factor,
            "difference": relation["scaled_difference"] / norm,
            "tolerance": tolerance / norm,
        }
        text = f"Y = {factor:.6g}·X, ‖Y − {factor:.6g}·X‖/‖Y‖ = {_rounding(figures)}"
        return Evidence(self.found.paths[y], text, figures)

    def _truncated(self, x: int, y: int) -> Evidence | None:
        relation = self.known[x, y]
        factor, kept = relation["truncation_factor"], relation["kept"]
        difference = relation["truncation_difference"]
        if relation["other_difference"] is not None:
            return None
        # There are all three of them or none.
        if factor is None or kept is None or difference is None:
            return None
        norm = relation["norms"][1]
        tolerance = TRUNCATION_SLACK * self._tolerance(x, y, factor)
        if not difference <= tolerance:
            return None
        figures: dict[str, float | str] = {
            "factor": factor,
            "kept": kept,
            "difference": difference / norm,
            "tolerance": tolerance / norm,
        }
        ranks = self.signatures[x].rank, self.signatures[y].rank
        scale = "" if abs(factor - 1) < 1e-3 else f" times {factor:.6g}"
        text = (
            f"Y is X_k{scale}, X with {ranks[1]} of its {ranks[0]} singular values and "
            f"{100 * kept:.4g} % of its energy; ‖Y − X_k‖/‖Y‖ = {_rounding(figures)}"
        )
        return Evidence(self.found.paths[y], text, figures)


def _rounding(figures: dict[str, float | str]) -> str:
    difference, tolerance = figures["difference"], figures["tolerance"]
    return f"{difference:.2g}, within rounding ({tolerance:.2g})"


def _components(nodes: set[int], edges: dict[int, set[int]]) -> list[set[int]]:
    """The connected components, in the order of their least member."""
    left = set(nodes)
    found = []
    for node in sorted(nodes):
        if node not in left:
            continue
        component, waiting = set(), [node]
        left.discard(node)
        while waiting:
            at = waiting.pop()
            component.add(at)
            fresh = edges[at] & left
            left -= fresh
            waiting += fresh
        found.append(component)
    return found
