"""`lorafast analyze`, `compare` and `report`: streams, files, exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lorafast
import numpy as np
import pytest
from lorafast._cli.main import main
from support.analysis import random_factors, write_factors
from support.handmade import adapter_tensors, make_adapter, make_base

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def style(tmp_path: Path) -> str:
    return str(make_adapter(tmp_path / "style"))


@pytest.fixture
def facts(tmp_path: Path) -> str:
    return str(make_adapter(tmp_path / "facts", adapter_tensors(rank=2, seed=9), r=2))


@pytest.fixture
def untrained(tmp_path: Path) -> str:
    factors = random_factors({"layers.0.q": (8, 6, 2)})
    zero = {path: (np.zeros_like(b), a) for path, (b, a) in factors.items()}
    return str(write_factors(tmp_path / "untrained", zero))


@pytest.fixture
def broken(tmp_path: Path) -> str:
    path = make_adapter(tmp_path / "broken")
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    return str(path)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_findings_stand_first(untrained: str, capsys: Capture) -> None:
    assert main(["analyze", untrained]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("untrained: 1 module")
    assert lines[1].startswith("  critical: Every update is zero")


def test_check_exits_with_3_where_a_finding_is_critical(
    style: str, untrained: str, broken: str
) -> None:
    assert main(["analyze", style, "--check", "--quiet"]) == 0
    assert main(["analyze", style, untrained, "--check", "--quiet"]) == 3
    # That something could not be looked at weighs more.
    assert main(["analyze", untrained, broken, "--check", "--quiet"]) == 1


def test_a_broken_adapter_is_named_and_the_others_done(
    style: str, facts: str, broken: str, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "out"
    absent = str(tmp_path / "absent")
    arguments = ["analyze", style, broken, absent, facts, "--no-plots", "--output", str(output)]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("error: ") for line in errors)
    assert "broken" in errors[0]
    assert "absent" in errors[1]
    assert "style: 4 modules" in captured.out
    assert "facts: 4 modules" in captured.out
    assert names_in(output / "analysis") == [
        "analysis_report.md",
        "facts_analysis.json",
        "style_analysis.json",
    ]


def test_json_is_all_of_stdout(style: str, broken: str, capsys: Capture) -> None:
    assert main(["analyze", style, broken, "--json", "--quiet"]) == 1
    parsed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert parsed["schema_version"] == 2
    (analysis,) = parsed["analyses"]
    assert analysis == json.loads(lorafast.analyze(style).to_json())
    (error,) = parsed["errors"]
    assert error["path"] == broken


@pytest.mark.parametrize(("form", "start"), [("md", "# LoRA"), ("html", "<!"), ("json", "{")])
def test_a_report_may_be_printed(style: str, form: str, start: str, capsys: Capture) -> None:
    assert main(["analyze", style, "--format", form]) == 0
    assert capsys.readouterr().out.lower().startswith(start.lower())


def test_an_output_directory_is_laid_out_as_neurotrains(style: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert main(["analyze", style, "--output", str(output), "--bins", "20", "--quiet"]) == 0
    assert names_in(output) == ["analysis", "visualizations"]
    assert names_in(output / "analysis") == ["analysis_report.md", "style_analysis.json"]
    pictures = names_in(output / "visualizations")
    assert {"style_weight_analysis.png", "style_weight_heatmap.png"} <= set(pictures)
    written = json.loads((output / "analysis" / "style_analysis.json").read_text())
    assert len(written["weights"]["histogram"]["counts"]) == 20


def test_a_base_relates_the_norms(style: str, tmp_path: Path, capsys: Capture) -> None:
    base = make_base(tmp_path / "base")
    assert main(["analyze", style, "--base", str(base)]) == 0
    assert "‖ΔW‖/‖W‖" in capsys.readouterr().out


def test_without_matplotlib_the_rest_is_written(
    style: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("lorafast._report.plots")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    output = tmp_path / "out"
    assert main(["analyze", style, "--output", str(output)]) == 0
    captured = capsys.readouterr()
    assert "warning: no plots were drawn" in captured.err
    assert "pip install" in captured.err
    assert names_in(output / "analysis") == ["analysis_report.md", "style_analysis.json"]


def test_compare_shows_cosines_and_writes(
    style: str, facts: str, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "out"
    assert main(["compare", style, facts, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "Comparison of 2 adapters" in printed
    assert "1.0000" in printed
    assert names_in(output / "analysis") == [
        "adapter_comparison.json",
        "comparison_report.md",
        "facts_analysis.json",
        "style_analysis.json",
    ]
    assert "adapter_comparison.png" in names_in(output / "visualizations")


def test_compare_leaves_the_broken_out(
    style: str, facts: str, broken: str, capsys: Capture
) -> None:
    assert main(["compare", style, broken, facts, "--json", "--quiet"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["names"] == ["style", "facts"]
    assert "broken" in captured.err
    assert main(["compare", style, broken]) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["analyze"],
        ["analyze", "a", "b", "--format", "html"],
        ["compare", "a"],
        ["compare", "a", "b", "--names", "x"],
        ["compare", "a", "b", "--names", "x", "x"],
        ["report"],
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments: list[str], capsys: Capture) -> None:
    assert main(arguments) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--bins", "0"], ["--threads", "0"]])
def test_a_wrong_value_is_one_line(style: str, flags: list[str], capsys: Capture) -> None:
    assert main(["analyze", style, *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_report_writes_the_pages_again(style: str, facts: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert main(["compare", style, facts, "--output", str(output), "--no-plots", "--quiet"]) == 0
    assert main(["report", str(output), "--quiet"]) == 0
    pages = [name for name in names_in(output / "analysis") if "report" in name]
    assert pages == [
        "analysis_report.md",
        "comparison_report.html",
        "comparison_report.md",
        "facts_report.html",
        "style_report.html",
    ]
    text = (output / "analysis" / "analysis_report.md").read_text()
    for path in (facts, style):
        assert lorafast.analyze(path).to_markdown() in text
    expected = lorafast.compare([style, facts]).to_markdown()
    assert (output / "analysis" / "comparison_report.md").read_text() == expected


def test_report_of_what_is_no_output(tmp_path: Path, capsys: Capture) -> None:
    assert main(["report", str(tmp_path / "absent")]) == 1
    assert main(["report", str(tmp_path)]) == 1
    assert "lorafast analyze" in capsys.readouterr().err
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "x_analysis.json").write_text('{"schema_version": 7}')
    assert main(["report", str(tmp_path)]) == 1
    assert "x_analysis.json" in capsys.readouterr().err
