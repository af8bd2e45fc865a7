"""Adapters with weights on the command line, its letters, its suggestions, and errors as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lorafast
import pytest
from lorafast._cli.main import main
from lorafast._io import progress
from support.files import read_checkpoint
from support.handmade import adapter_tensors, make_adapter, make_base


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_base(tmp_path / "base")
    for seed, name in enumerate("ab"):
        make_adapter(tmp_path / name, adapter_tensors(seed=seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(*words: str) -> dict[str, Any]:
    assert main(["merge", "-b", "base", *words, "-o", "out", "--overwrite", "--quiet"]) == 0
    return read_checkpoint(Path("out"))


@pytest.mark.parametrize(
    "words",
    [
        ["-a", "a:0.5", "b:-2"],
        ["-a", "a:0.5,b:-2"],
        ["--adapters", "a", "b", "--strategy", "weighted", "--weights", "0.5", "-2"],
        ["-a", "a", "b", "-w", "0.5", "-2"],
        ["-a", "a,b", "--weights", "0.5", "-2e0"],
        ["-a", "a:5e-1", "-a", "b:-2"],
    ],
    ids=" ".join,
)
def test_weights_however_they_are_given(folder: Path, words: list[str]) -> None:
    lorafast.merge("base", ["a", "b"], "expected", strategy="weighted", weights=[0.5, -2])
    assert merged(*words) == read_checkpoint(folder / "expected")
    flags = ["-b", "base", *words]
    assert main(["verify", *flags, "--merged", "out", "--quiet"]) == 0
    back = ["subtract", "--merged", "out", *flags, "-o", "back", "--overwrite", "--quiet"]
    assert main(back) == 0
    assert read_checkpoint(folder / "back") == read_checkpoint(folder / "base")


def test_one_weight_leaves_the_others_at_one(folder: Path) -> None:
    lorafast.merge("base", ["a", "b"], "expected", weights=[1, 0.25])
    assert merged("-a", "a", "b:0.25") == read_checkpoint(folder / "expected")
    assert lorafast.plan("base", ["a", "b"], weights=[1, 0.25]).to_dict()["strategy"] == "weighted"
    assert lorafast.plan("base", ["a", "b"]).to_dict()["strategy"] == "sequential"


def test_what_is_there_under_a_word_is_taken_as_it_stands(folder: Path) -> None:
    for name in ("a,b", "a:0.5"):
        make_adapter(folder / name, adapter_tensors(seed=7))
        lorafast.merge("base", [name], "expected", overwrite=True)
        assert merged("-a", name) == read_checkpoint(folder / "expected")


def test_weights_that_contradict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "-b", "base", "-a", "a:0.5", "-w", "1", "-o", "out"]) == 2
    assert "weights stand both behind adapters and in --weights" in capsys.readouterr().err
    with pytest.raises(ValueError, match='only the strategy "weighted" uses them'):
        lorafast.plan("base", "a", strategy="sequential", weights=[1.0])
    assert main(["merge", "-b", "base", "-a", "a:0.5", "b:x", "-o", "out"]) == 1
    assert "b:x" in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["mrege", "--base", "x"], "merge"),
        (["merge", "-b", "x", "-a", "y", "--ouptut", "z"], "--output"),
        (["merge", "-b", "x", "-a", "y", "--ouptut=z"], "--output"),
        (["scan", "x", "--metrics", "spectre"], "spectra"),
        (["merge", "-b", "x", "-a", "y", "--strategy", "avrage"], "average"),
    ],
    ids=" ".join,
)
def test_did_you_mean(
    words: list[str], suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.endswith(f"; did you mean {suggestion}?\n")


def test_what_is_like_nothing_is_not_guessed_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["qqqq"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_the_version_has_a_letter(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["-V"], ["--version"], ["-V", "merge"]):
        assert main(words) == 0
        assert capsys.readouterr().out == f"lorafast {lorafast.__version__}\n"


@pytest.mark.usefixtures("folder")
def test_errors_are_json_for_who_asked_for_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-b", "absent", "-a", "a", "--json"]
    assert main(["merge", *words, "--dry-run"]) == 1
    shown = capsys.readouterr()
    error = json.loads(shown.out)["error"]
    assert error["kind"] == "FileNotFoundError"
    assert "absent" in error["message"]
    assert error["problems"] == []
    assert shown.err.startswith("error: ")
    assert main(["merge", *words[:-1], "--dry-run"]) == 1
    assert capsys.readouterr().out == ""


def test_progress_is_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with progress.callback(True, label="merging") as tell:
        assert tell is not None
        for second in range(26):
            now[0] = 100.0 + second
            tell(second * 10**9, 25 * 10**9)
    assert capsys.readouterr().err.splitlines() == [
        "merging: 40%, 10.0 of 25.0 GB, 10 s",
        "merging: 80%, 20.0 of 25.0 GB, 20 s",
    ]
    with progress.callback(False) as tell:
        assert tell is None
