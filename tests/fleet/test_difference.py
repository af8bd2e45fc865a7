"""What has changed between two scans, whatever they were saved as."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._cli.main import main
from support.analysis import random_factors, write_factors

SHAPES = {"model.layers.0.q": (12, 10, 4), "model.layers.1.q": (8, 9, 4)}
Capture = pytest.CaptureFixture[str]


def make(root: Path) -> Path:
    for seed, name in enumerate(("run/a", "run/b", "run/c", "old/final", "sound", "sick")):
        write_factors(root / name, random_factors(SHAPES, seed))
    (root / "sick" / "adapter_config.json").write_text("{")
    return root


def change(root: Path) -> None:
    """One change of each kind."""
    shutil.rmtree(root / "run" / "b")
    write_factors(root / "run" / "b", random_factors(SHAPES, 11))
    config = root / "run" / "c" / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "lora_alpha": 0.8}))
    shutil.rmtree(root / "old")
    (root / "run" / "a").rename(root / "run" / "z")
    write_factors(root / "new" / "final", random_factors(SHAPES, 12))
    (root / "sound" / "adapter_config.json").write_text("{")
    shutil.rmtree(root / "sick")
    write_factors(root / "sick", random_factors(SHAPES, 5))


def as_fleet(fleet: lorafast.Fleet, path: Path) -> Any:
    del path
    return fleet


def as_json(fleet: lorafast.Fleet, path: Path) -> Any:
    fleet.save(path.with_suffix(".json"))
    return path.with_suffix(".json")


def as_parquet(fleet: lorafast.Fleet, path: Path) -> Any:
    fleet.to_parquet(path)
    return str(path)


def as_table(fleet: lorafast.Fleet, path: Path) -> Any:
    return path / fleet.to_parquet(path)[0].name


FORMS: list[Callable[[lorafast.Fleet, Path], Any]] = [as_fleet, as_json, as_parquet, as_table]


@pytest.mark.parametrize("later", FORMS)
@pytest.mark.parametrize("earlier", FORMS)
def test_each_kind_of_change_is_told(tmp_path: Path, earlier: Any, later: Any) -> None:
    root = make(tmp_path / "runs")
    before = earlier(lorafast.scan(root), tmp_path / "before")
    change(root)
    # It is the paths below the root that count.
    after = later(lorafast.scan(root.rename(tmp_path / "moved")), tmp_path / "after")
    found = lorafast.scan_diff(before, after)
    assert found
    assert found.added == ["new/final"]
    assert found.removed == ["old/final"]
    assert found.renamed == [("run/a", "run/z")]
    assert found.unchanged == 0
    assert list(found.unreadable) == ["sound"]
    assert "adapter_config.json" in found.unreadable["sound"]
    assert found.readable == ["sick"]
    assert found.notes == []
    b, c = found.changed
    assert (b.name, b.weights, c.name, c.weights) == ("run/b", True, "run/c", False)
    assert {"frobenius_norm", "mean", "std"} <= set(b.metrics)
    assert "alpha" not in b.metrics
    assert b.findings == []
    assert c.metrics["alpha"] == (4, 0.8)
    assert c.metrics["scaling"] == (1, 0.2)
    assert "mean" not in c.metrics
    assert [(each.kind, each.severity, each.before, each.after) for each in c.findings] == [
        ("unusual_scale", "warning", 0, 1)
    ]
    assert found.summary == (
        "1 added, 1 removed, 1 renamed, 2 changed, 1 unreadable now, 1 readable again, 0 unchanged"
    )
    assert found.summary in repr(found)
    plain = json.loads(found.to_json())
    assert plain["kind"] == "scan_diff"
    assert plain["changed"][1]["metrics"]["alpha"] == [4, 0.8]
    assert plain["renamed"] == [["run/a", "run/z"]]
    assert "ScanDiff" in found._repr_html_()


@pytest.mark.parametrize("metrics", ["full", "headers", "moments", "spectra"])
def test_the_same_scan_has_not_changed(tmp_path: Path, metrics: Any) -> None:
    root = make(tmp_path / "runs")
    write_factors(root / "zero", {p: (0 * b, a) for p, (b, a) in random_factors(SHAPES).items()})
    broken = random_factors(SHAPES, 3)
    broken["model.layers.0.q"][0][0, 0] = np.nan
    write_factors(root / "nan", broken)
    fleet = lorafast.scan(root, metrics=metrics)
    shutil.copytree(root, tmp_path / "copy")
    for form in FORMS:
        saved = form(lorafast.scan(tmp_path / "copy", metrics=metrics), tmp_path / form.__name__)
        found = lorafast.scan_diff(saved, fleet)
        assert not found
        assert found.unchanged == 7
        assert found.summary == "7 unchanged"
        assert bool(found.notes) is (metrics == "headers")


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    root = make(tmp_path / "runs")
    full, headers = lorafast.scan(root), lorafast.scan(root, metrics="headers")
    found = lorafast.scan_diff(headers, full)
    assert not found
    assert any("findings, and figures that only one has" in note for note in found.notes)
    assert any("no digests" in note for note in found.notes)
    change(root)
    again = lorafast.scan_diff(headers, lorafast.scan(root, metrics="headers"))
    # Without digests new weights of the same shapes are the same, and no name is another's.
    assert [each.name for each in again.changed] == ["run/c"]
    assert again.changed[0].weights is None
    assert (again.added, again.removed) == (["new/final", "run/z"], ["old/final", "run/a"])


def test_copies_are_not_taken_for_renamed(tmp_path: Path) -> None:
    root = make(tmp_path / "runs")
    before = lorafast.scan(root)
    shutil.copytree(root / "run" / "a", root / "copy-1")
    shutil.copytree(root / "run" / "a", root / "copy-2")
    shutil.rmtree(root / "run" / "a")
    found = lorafast.scan_diff(before, lorafast.scan(root))
    assert found.renamed == []
    assert sorted(found.added) == ["copy-1", "copy-2"]
    assert found.removed == ["run/a"]


def test_findings_of_the_whole_fleet_come_and_go(tmp_path: Path) -> None:
    root = make(tmp_path / "runs")
    before = lorafast.scan(root)
    write_factors(root / "x", random_factors(SHAPES, 30), base_model_name_or_path="another")
    found = lorafast.scan_diff(before, lorafast.scan(root))
    assert [(each.kind, each.after) for each in found.findings] == [("several_bases", 1)]
    back = lorafast.scan_diff(lorafast.scan(root), before)
    assert [(each.kind, each.before, each.after) for each in back.findings] == [
        ("several_bases", 1, 0)
    ]


def test_a_scan_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    """Its names were directories' last parts, and it has no root."""
    root = make(tmp_path / "runs")
    fleet = lorafast.scan(root)
    plain = json.loads(fleet.to_json())
    del plain["root"]
    for row in plain["adapters"]:
        row["name"] = row["name"].replace("/", "_")
    for item in plain["findings"]:
        item["adapter"] = item["adapter"] and item["adapter"].replace("/", "_")
    (tmp_path / "old.json").write_text(json.dumps(plain))
    assert not lorafast.scan_diff(tmp_path / "old.json", fleet)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is no scan; write one with: lorafast scan DIR --json"),
        ("{", "is not valid JSON|JSON"),
        ('{"kind": "comparison", "schema_version": 2}', "is no scan"),
        ('{"kind": "fleet", "schema_version": 99}', "its schema version is 99"),
        ('{"kind": "fleet", "schema_version": 2}', "is no scan that was saved"),
    ],
)
def test_what_is_no_scan_is_refused(tmp_path: Path, content: str, message: str) -> None:
    root = make(tmp_path / "runs")
    fleet = lorafast.scan(root, metrics="headers")
    (tmp_path / "saved.json").write_text(content)
    with pytest.raises(lorafast.LorafastError, match=message):
        lorafast.scan_diff(tmp_path / "saved.json", fleet)
    with pytest.raises(lorafast.LorafastError, match=r"holds no adapters\.parquet"):
        lorafast.scan_diff(root, fleet)
    with pytest.raises(FileNotFoundError):
        lorafast.scan_diff(tmp_path / "gone.json", fleet)
    fleet.to_parquet(tmp_path / "tables")
    (tmp_path / "tables" / "adapters.parquet").write_bytes(b"no")
    with pytest.raises(lorafast.LorafastError, match="is no table that was saved"):
        lorafast.scan_diff(tmp_path / "tables", fleet)


def test_the_command_shows_it_and_says_so_by_its_exit_code(tmp_path: Path, capsys: Capture) -> None:
    root = make(tmp_path / "runs")
    old = tmp_path / "old.json"
    assert main(["scan", str(root), "--json", "--quiet"]) == 0
    old.write_text(capsys.readouterr().out)
    assert main(["scan", str(root), "--output", str(tmp_path / "same"), "--quiet"]) == 0
    assert main(["scan-diff", str(old), str(tmp_path / "same"), "--check"]) == 0
    assert capsys.readouterr().out == f"{old} → {tmp_path / 'same'}: 5 unchanged\n"
    change(root)
    assert main(["scan", str(root), "--output", str(tmp_path / "new"), "--quiet"]) == 0
    assert main(["scan-diff", str(old), str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    for line in ("Added\n  new/final\n", "Removed\n  old/final\n", "Renamed\n  run/a → run/z\n"):
        assert line in printed
    assert "run/b    other weights; mean " in printed
    assert "run/c    alpha 4 → 0.8; scaling 1 → 0.2; " in printed
    assert "+warning unusual_scale" in printed
    assert main(["scan-diff", str(old), str(tmp_path / "new"), "--check", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["added"] == ["new/final"]
    assert main(["scan-diff", str(old), str(tmp_path / "gone")]) == 1


def test_a_scan_is_held_against_an_earlier_one(tmp_path: Path, capsys: Capture) -> None:
    root = make(tmp_path / "runs")
    saved = tmp_path / "saved"
    assert main(["scan", str(root), "--output", str(saved), "--quiet"]) == 0
    change(root)
    # The earlier one is read before it is written over.
    command = ["scan", str(root), "--against", str(saved), "--output", str(saved)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "1 added, 1 removed, 1 renamed, 2 changed" in printed
    assert main(["scan", str(root), "--against", str(saved), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["unchanged"] == 5
