"""`lorafast scan`."""

from __future__ import annotations

import json
from pathlib import Path

import lorafast
import pytest
from lorafast._cli.main import main
from support.handmade import make_adapter


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    for index in range(3):
        make_adapter(tmp_path / "fleet" / f"a{index}", r=4, lora_alpha=8 + index)
    make_adapter(tmp_path / "fleet" / "other", peft_type="IA3")
    return tmp_path / "fleet"


def test_the_summary_says_what_there_is_and_what_is_wrong(
    fleet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", str(fleet)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "3 adapters, 12 modules"
    assert any(line.startswith(f"  {fleet}/other: adapter_config.json: is a IA3") for line in lines)
    assert lines[-1].split()[:3] == ["base", "4", "3"]
    assert captured.err == "warning: 1 adapter could not be read\n"


def test_tables_and_page_are_written(fleet: Path, tmp_path: Path) -> None:
    import pyarrow.parquet

    out = tmp_path / "out"
    command = ["scan", str(fleet), "--output", str(out), "--html", "--quiet"]
    assert main([*command, "--cache", str(tmp_path / "cache"), "--threads", "2"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "adapters.parquet",
        "errors.json",
        "findings.parquet",
        "fleet.html",
        "modules.parquet",
    ]
    table = pyarrow.parquet.read_table(out / "modules.parquet")
    expected = lorafast.scan(fleet).modules["frobenius_norm"].tolist()
    assert table["frobenius_norm"].to_pylist() == expected
    assert list((tmp_path / "cache").iterdir())


def test_a_page_alone_goes_into_the_current_directory(
    fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["scan", str(fleet), "--html", "--quiet"]) == 0
    assert (tmp_path / "fleet.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_json_is_strict_and_whole(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", str(fleet), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [row["alpha"] for row in found["adapters"]] == [8, 9, 10]
    assert [error["path"] for error in found["errors"]] == [str(fleet / "other")]
    assert found["metrics"] == "full"
    assert {"adapter", "severity", "kind", "reason", "count"} <= set(found["findings"][0])


@pytest.mark.parametrize("metrics", ["headers", "moments", "spectra"])
def test_every_level_can_be_shown(
    fleet: Path, metrics: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", str(fleet), "--metrics", metrics]) == 0
    assert "3 adapters, 12 modules" in capsys.readouterr().out


def test_nothing_to_read_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no adapter was found")
    make_adapter(tmp_path / "other", peft_type="IA3")
    assert main(["scan", str(tmp_path)]) == 1
