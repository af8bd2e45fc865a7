"""What has changed between two scans: `lorafast.scan_diff`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafast._analysis.findings import SEVERITIES
from lorafast._errors import LorafastError, missing
from lorafast._fleet.fleet import Fleet
from lorafast._fleet.members import common_root, names_below
from lorafast._io.paths import expand, find, is_directory
from lorafast._io.strangers import read_json
from lorafast._results import READ_VERSIONS, RecordDict, RecordList, Result, shown
from lorafast._types import Source

#: Figures that differ by a smaller share are the same: devices agree to rounding alone.
ROUNDING = 1e-6
#: Columns that say where an adapter lies or sum up what stands elsewhere.
NO_METRICS = frozenset({"path", "name", "blake3", "severe", "warnings", "notes", "findings"})
#: The files of a scan that was written by `to_parquet`.
TABLE, FINDINGS, ERRORS = "adapters.parquet", "findings.parquet", "errors.json"
#: Columns of findings that have other names in JSON.
RENAMED = {"figure": "value"}

Value = str | int | float | list[Any] | None


@shown
@dataclass(frozen=True)
class FindingChange:
    """A kind of finding that came, went, or is about another number of modules.

    Attributes:
        kind: the kind.
        severity: critical, warning or note; that of the later scan where both have it.
        before: how many modules it was about; 0 where there was none.
        after: how many it is about now.
    """

    kind: str
    severity: str
    before: int
    after: int


@shown
@dataclass(frozen=True)
class AdapterChange:
    """An adapter that both scans have, and that is not the same in both.

    Attributes:
        name: its name: its path below the root.
        weights: whether its weights file is another one, by its digest; `None` where a scan of
            headers has none.
        metrics: for each figure or setting that differs by more than rounding its values before
            and after; `None` and NaN are alike.
        findings: findings that came, went, or changed their number.
    """

    name: str
    weights: bool | None
    metrics: dict[str, tuple[Value, Value]]
    findings: list[FindingChange]


@dataclass(frozen=True, repr=False)
class ScanDiff(Result):
    """What has changed from one scan to another. Made by `lorafast.scan_diff`.

    Adapters are the same where they have one name, which is the path below the root that was
    scanned: two scans of a directory that was moved or copied can be compared.

    Attributes:
        before: what the earlier scan is called: its path, or its root.
        after: the same of the later one.
        added: names that only the later one has.
        removed: names that only the earlier one has, and that are no errors now.
        renamed: names before and after of adapters with the same weights file, of which there was
            one before and is one after.
        changed: adapters that both have and that differ.
        unchanged: how many are the same.
        unreadable: for each name that could be read before, or was not there, why it cannot be
            read now.
        readable: names that could not be read before and can be now.
        findings: findings about the fleet as a whole that came or went.
        notes: what was not compared, and why.
    """

    before: str
    after: str
    added: list[str]
    removed: list[str]
    renamed: list[tuple[str, str]]
    changed: list[AdapterChange]
    unchanged: int
    unreadable: dict[str, str]
    readable: list[str]
    findings: list[FindingChange] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    _kind = "scan_diff"

    def __post_init__(self) -> None:
        for name in ("added", "removed", "renamed", "changed", "readable", "findings", "notes"):
            object.__setattr__(self, name, RecordList(getattr(self, name)))
        object.__setattr__(self, "unreadable", RecordDict(self.unreadable))

    def __bool__(self) -> bool:
        """Whether anything has changed."""
        return any(
            (
                *(self.added, self.removed, self.renamed, self.changed),
                *(self.unreadable, self.readable, self.findings),
            )
        )

    @property
    def summary(self) -> str:
        """How many were added, removed, and so on, in words."""
        counts = {
            "added": len(self.added),
            "removed": len(self.removed),
            "renamed": len(self.renamed),
            "changed": len(self.changed),
            "unreadable now": len(self.unreadable),
            "readable again": len(self.readable),
        }
        parts = [f"{count:,} {what}" for what, count in counts.items() if count]
        return ", ".join([*parts, f"{self.unchanged:,} unchanged"])


@dataclass(frozen=True)
class _Scan:
    """A scan as plain objects, whatever it came from."""

    label: str
    metrics: str
    rows: dict[str, Mapping[str, Any]]
    findings: dict[str | None, dict[str, tuple[str, int]]]
    errors: dict[str, str]


def scan_diff(before: Fleet | Source, after: Fleet | Source) -> ScanDiff:
    """Tells what has changed from one scan to another.

    Args:
        before: the earlier scan: a fleet; a JSON file (`Fleet.save`, `lorafast scan --json`); or
            the directory that `Fleet.to_parquet` or `lorafast scan --output` wrote.
        after: the later one.

    Returns:
        Adapters added, removed, renamed and changed, and by which figures and findings. It is
        false where nothing has changed.

    Raises:
        FileNotFoundError: a scan is not there.
        LorafastError: it is no scan that was saved.
        MissingDependencyError: it is one in Parquet, and pyarrow is not installed.
    """
    old, new = _loaded(before), _loaded(after)
    added = [name for name in new.rows if name not in old.rows]
    removed = [name for name in old.rows if name not in new.rows and name not in new.errors]
    renamed = _renamed(old, new, removed, added)
    gone, come = {name for name, _ in renamed}, {name for _, name in renamed}
    notes = _notes(old, new)
    has_findings = old.metrics == new.metrics
    both = [name for name in new.rows if name in old.rows]
    changed = [found for name in both if (found := _change(old, new, name, has_findings))]
    return ScanDiff(
        before=old.label,
        after=new.label,
        added=[name for name in added if name not in come and name not in old.errors],
        removed=[name for name in removed if name not in gone],
        renamed=renamed,
        changed=changed,
        unchanged=len(both) - len(changed),
        unreadable={name: reason for name, reason in new.errors.items() if name not in old.errors},
        readable=[name for name in added if name in old.errors and name not in come],
        findings=_findings(old, new, None) if has_findings else [],
        notes=notes,
    )


def _notes(old: _Scan, new: _Scan) -> list[str]:
    notes = []
    if old.metrics != new.metrics:
        notes.append(
            f"the scans looked at different things ({old.metrics} and {new.metrics}): findings, "
            "and figures that only one has, are not compared"
        )
    without = [scan.label for scan in (old, new) if scan.rows and not _has_digests(scan)]
    if without:
        notes.append(
            f"{' and '.join(without)} has no digests of the weights files, as scans of headers: "
            "weights of the same size and shapes may differ unseen"
        )
    return notes


def _has_digests(scan: _Scan) -> bool:
    return any(row.get("blake3") is not None for row in scan.rows.values())


def _renamed(
    old: _Scan, new: _Scan, removed: Iterable[str], added: Iterable[str]
) -> list[tuple[str, str]]:
    """Those of the removed that are among the added, by a digest that no other has."""
    names: dict[str, tuple[list[str], list[str]]] = {}
    for side, scan, here in ((0, old, removed), (1, new, added)):
        for name in here:
            digest = scan.rows[name].get("blake3")
            if digest is not None:
                names.setdefault(digest, ([], []))[side].append(name)
    return [(one[0], other[0]) for one, other in names.values() if len(one) == len(other) == 1]


def _change(old: _Scan, new: _Scan, name: str, has_findings: bool) -> AdapterChange | None:
    """What differs in an adapter that both have; `None` of one that is the same."""
    one, other = old.rows[name], new.rows[name]
    digests = one.get("blake3"), other.get("blake3")
    weights = None if None in digests else digests[0] != digests[1]
    metrics = {
        key: (_plain(one[key]), _plain(other[key]))
        for key in other
        if key in one and key not in NO_METRICS and not _is_same(one[key], other[key])
    }
    findings = _findings(old, new, name) if has_findings else []
    if not (weights or metrics or findings):
        return None
    return AdapterChange(name, weights, metrics, findings)


def _findings(old: _Scan, new: _Scan, adapter: str | None) -> list[FindingChange]:
    one, other = old.findings.get(adapter, {}), new.findings.get(adapter, {})
    changes = []
    for kind in {**other, **one}:
        before, after = one.get(kind), other.get(kind)
        if before != after:
            severity, _ = after or before or ("note", 0)
            counts = (before or ("", 0))[1], (after or ("", 0))[1]
            changes.append(FindingChange(kind, severity, *counts))
    return sorted(changes, key=lambda change: SEVERITIES.index(change.severity))


def _plain(value: Any) -> Value:
    """A value of a table as one of JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, list | tuple) else value


def _is_same(one: Any, other: Any) -> bool:
    one, other = _plain(one), _plain(other)
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return math.isclose(one, other, rel_tol=ROUNDING) if numbers else bool(one == other)


def is_parquet(scan: Source) -> bool:
    """Whether a scan that was saved is one in Parquet."""
    path = Path(expand(scan))
    return path.name == TABLE or (path / TABLE).exists()


def _loaded(scan: Fleet | Source) -> _Scan:
    if isinstance(scan, Fleet):
        return _of_plain(scan.to_dict(), f"the scan of {scan.root}")
    path = Path(expand(scan))
    if find(path) is None:
        raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
    if path.name == TABLE:
        path = path.parent
    try:
        return _of_plain(_parquet(path) if is_directory(path) else _json(path), os.fspath(scan))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LorafastError(f"{path}: is no scan that was saved ({error!r})") from error


def _json(path: Path) -> dict[str, Any]:
    plain = read_json(path, LorafastError)
    if not isinstance(plain, dict) or plain.get("kind") != Fleet._kind:
        raise LorafastError(
            f"{path}: is no scan; write one with: lorafast scan DIR --json > {path.name}"
        )
    if plain.get("schema_version") not in READ_VERSIONS:
        raise LorafastError(
            f"{path}: its schema version is {plain.get('schema_version')!r}; this lorafast reads "
            f"{' and '.join(map(str, READ_VERSIONS))}"
        )
    return plain


def _parquet(directory: Path) -> dict[str, Any]:
    if find(directory / TABLE) is None:
        raise LorafastError(
            f"{directory}: holds no {TABLE}; give a scan that was saved, by lorafast scan DIR "
            "--output SCAN, or --json > SCAN.json"
        )
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise missing("pyarrow", "arrow", "read a scan in Parquet") from error

    def rows(name: str) -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = pyarrow.parquet.read_table(directory / name).to_pylist()
        except pyarrow.ArrowException as error:
            raise LorafastError(
                f"{directory / name}: is no table that was saved: {error}"
            ) from error
        return [{RENAMED.get(key, key): value for key, value in row.items()} for row in found]

    about = read_json(directory / ERRORS, LorafastError)
    return {**about, "adapters": rows(TABLE), "findings": rows(FINDINGS)}


def _metrics_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """How much a scan has looked at, by its columns."""
    known = {key for row in rows[:1] for key in row}
    return {
        (True, True): "full",
        (True, False): "moments",
        (False, True): "spectra",
    }.get(("std" in known, "frobenius_norm" in known), "headers")


def _of_plain(plain: Mapping[str, Any], label: str) -> _Scan:
    rows = plain["adapters"]
    failed = [(error["path"], error["reason"]) for error in plain["errors"]]
    root = plain.get("root")
    if root is None:
        # Of a release whose names were no paths.
        paths = [row["path"] for row in rows]
        root = common_root([os.path.dirname(path) for path in paths] or [os.curdir])
        again = dict(zip([row["name"] for row in rows], names_below(root, paths), strict=True))
    else:
        again = {row["name"]: row["name"] for row in rows}
    findings: dict[str | None, dict[str, tuple[str, int]]] = {}
    for item in plain["findings"]:
        adapter = item["adapter"]
        own = findings.setdefault(None if adapter is None else again[adapter], {})
        severity = str(item["severity"])
        if severity == "severe":
            # As earlier releases called it.
            severity = "critical"
        # A kind may occur more than once; what each says of itself is no change.
        _, count = own.get(item["kind"], ("", 0))
        own[item["kind"]] = (severity, count + item["count"])
    return _Scan(
        label=label,
        metrics=plain.get("metrics") or _metrics_of(rows),
        rows={again[row["name"]]: row for row in rows},
        findings=findings,
        errors=dict(
            zip(
                names_below(root, [path for path, _ in failed]),
                (reason for _, reason in failed),
                strict=True,
            )
        ),
    )


# What users see, and what a pickle names.
ScanDiff.__module__ = AdapterChange.__module__ = FindingChange.__module__ = "lorafast"
