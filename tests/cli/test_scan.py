"""`lorafast scan`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import lorafast
import numpy as np
import pytest
from lorafast._cli.main import main
from support.files import Tensor, tensor
from support.handmade import adapter_tensors, make_adapter


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    for index in range(3):
        make_adapter(tmp_path / "fleet" / f"a{index}", r=4, lora_alpha=8 + index)
    make_adapter(tmp_path / "fleet" / "other", peft_type="OFT")
    return tmp_path / "fleet"


def test_the_summary_says_what_there_is_and_what_is_wrong(
    fleet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", str(fleet)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "3 adapters, 12 modules"
    assert any(
        line.startswith(f"  {fleet}/other: adapter_config.json: is an OFT") for line in lines
    )
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
    make_adapter(tmp_path / "other", peft_type="OFT")
    assert main(["scan", str(tmp_path)]) == 1


@pytest.fixture
def findings(tmp_path: Path) -> Path:
    """An adapter without findings, one with a warning, and one with a critical finding."""
    root = tmp_path / "checked"
    make_adapter(root / "good", random_adapter())
    make_adapter(root / "odd" / "warned", random_adapter(), lora_alpha=400)
    tensors = random_adapter()
    for name, value in tensors.items():
        if ".lora_B." in name:
            tensors[name] = tensor(np.zeros(value.shape), "F32")
    make_adapter(root / "bad" / "untrained", tensors)
    return root


def random_adapter() -> dict[str, Tensor]:
    """Factors that nothing is to be said of."""
    return {
        name: tensor(np.random.default_rng(seed).normal(size=value.shape), "F32")
        for seed, (name, value) in enumerate(adapter_tensors().items())
    }


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 0),
        (["--check"], 3),
        (["--check=critical"], 3),
        (["--check=warning"], 3),
        (["--check", "--exclude", "bad"], 0),
        (["--check=critical", "--exclude", "untrained"], 0),
        (["--check=warning", "--exclude", "untrained"], 3),
        (["--check=warning", "--exclude", "bad", "--exclude", "odd/*"], 0),
        (["--fail-on-errors"], 0),
    ],
)
def test_the_exit_code_says_whether_there_are_findings(
    findings: Path, words: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", str(findings), *words]) == code
    # A bare one takes nothing of what follows it.
    assert main(["scan", *words, str(findings)]) == code
    assert capsys.readouterr().err == ""


def test_adapters_that_cannot_be_read_fail_where_that_is_asked_for(
    findings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(findings / "broken", config="{")
    assert main(["scan", str(findings)]) == 0
    assert main(["scan", str(findings), "--check"]) == 3
    assert main(["scan", str(findings), "--fail-on-errors"]) == 1
    assert main(["scan", str(findings), "--fail-on-errors", "--check=warning", "--json"]) == 1
    assert main(["scan", str(findings), "--fail-on-errors", "--exclude", "broken"]) == 0
    assert "1 adapter could not be read" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--check=note", "--check="])
def test_another_level_is_a_wrong_flag(
    findings: Path, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", str(findings), word]) == 2
    assert "--check=critical" in capsys.readouterr().err


def test_a_level_behind_a_blank_is_no_directory(
    findings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", str(findings), "--check", "warning"]) == 2
    capsys.readouterr()
    assert main(["scan", "--check", "warning", str(findings)]) == 2
    assert "--check=warning" in capsys.readouterr().err


def test_the_help_says_what_the_exit_codes_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", "--help"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"exit code:\n  1  no adapter can be read.*\n  3  with --check", text)
    assert "--exclude PATTERN" in text
