"""What fails when the model is finished is a warning, and outputs are where they are asked for."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lorafast
import pytest
from lorafast._cli.main import main
from lorafast._io import atomic
from support.files import read_checkpoint
from support.handmade import adapter_config, make_adapter, make_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full as soon as small files are to be written."""

    def refuse(path: Any, content: Any, **_: Any) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))

    monkeypatch.setattr(atomic, "write", refuse)


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), "/disk/model.safetensors")


@pytest.mark.usefixtures("full_disk")
def test_reports_that_do_not_fit_are_a_warning(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    report = lorafast.merge(base, adapter, output)
    (warning,) = report.warnings
    assert warning == (
        f"{output}: is finished, but its reports could not be written: No space left on device: "
        f"{output / 'merge_report.json'}"
    )
    assert read_checkpoint(output)
    flags = ["--base", str(base), "--adapters", str(adapter), "--output", str(tmp_path / "again")]
    assert main(["merge", *flags, "--quiet"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert "could not be written: No space left" in line


@pytest.mark.usefixtures("full_disk")
def test_a_subtractions_reports_that_do_not_fit_are_a_warning(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    lorafast.merge(base, adapter, tmp_path / "merged", report=False)
    report = lorafast.subtract(tmp_path / "merged", adapter, tmp_path / "again")
    assert any("its reports could not be written" in warning for warning in report.warnings)


def test_no_other_merge_comes_between_a_model_and_its_report(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the later model lay beside the earlier one's report."""
    output = tmp_path / "out"
    met = []

    def amid_another(write: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def written(report: Any, directory: Any) -> None:
            assert read_checkpoint(output)
            with pytest.raises(lorafast.OutputError, match="another merge is writing there"):
                lorafast.merge(base, adapter, output, overwrite=True)
            met.append(type(report).__name__)
            write(report, directory)

        return written

    for kind in (lorafast.MergeReport, lorafast.SubtractReport):
        monkeypatch.setattr(kind, "write", amid_another(kind.write))
    lorafast.merge(base, adapter, output)
    parts = lorafast.plan(base, adapter)
    written = [shard for part in parts.parts() for shard in part.write(tmp_path / "parts")]
    parts.assemble(tmp_path / "parts", written, output, overwrite=True)
    merged = output.rename(tmp_path / "merged")
    lorafast.subtract(merged, adapter, output)
    assert met == ["MergeReport", "MergeReport", "SubtractReport"]
    monkeypatch.undo()
    lorafast.merge(base, adapter, output, overwrite=True)


def test_an_interruption_says_when_the_output_is_finished(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lorafast.MergeReport, "write", interrupt)
    with pytest.raises(KeyboardInterrupt) as stopped:
        lorafast.merge(base, adapter, tmp_path / "out")
    assert stopped.value.__notes__ == ["the output was finished before that"]
    assert read_checkpoint(tmp_path / "out")
    monkeypatch.undo()
    lorafast.merge(base, adapter, tmp_path / "out", overwrite=True)


def test_what_cannot_be_unlocked_is_a_warning(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def failing(lock: Any) -> Iterator[list[str]]:
        warnings: list[str] = []
        yield warnings
        lock.release()
        warnings.append("could not be removed")

    monkeypatch.setattr("lorafast._merge.plan._held", failing)
    merged = lorafast.merge(base, adapter, tmp_path / "out")
    assert merged.warnings == ["could not be removed"]
    restored = lorafast.subtract(tmp_path / "out", adapter, tmp_path / "back")
    assert "could not be removed" in restored.warnings


def test_what_could_not_be_verified_is_an_error_and_no_model(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafast._merge.plan._Proof.__call__", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        lorafast.merge(base, adapter, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


def test_what_is_proved_wrong_is_an_error_and_no_model(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong:
        ok = False
        problems = ("a tensor differs",)

    older = lorafast.merge(base, adapter, tmp_path / "older")
    monkeypatch.setattr("lorafast._merge.verify.Verification", lambda **_: Wrong())
    with pytest.raises(lorafast.VerificationError, match="a tensor differs; nothing is left of it"):
        lorafast.merge(base, adapter, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()
    # What was to be replaced is still there.
    with pytest.raises(lorafast.VerificationError):
        lorafast.merge(base, adapter, tmp_path / "older", verify=True, overwrite=True)
    monkeypatch.undo()
    assert lorafast.verify(base, adapter, older.output_path).ok


def test_an_error_of_the_callers_progress_is_still_the_callers(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise ArithmeticError("enough")

    monkeypatch.setattr("lorafast._merge.plan._Proof.__call__", stop)
    with pytest.raises(ArithmeticError, match="enough"):
        lorafast.merge(base, adapter, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


def test_a_distance_that_could_not_be_measured_is_a_warning(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lorafast.merge(base, adapter, tmp_path / "merged")
    expected = lorafast.subtract(tmp_path / "merged", adapter, tmp_path / "expected")
    monkeypatch.setattr("lorafast._merge.subtract.callback", refuse)
    report = lorafast.subtract(tmp_path / "merged", adapter, tmp_path / "again")
    assert any("could not be measured: Input/output" in warning for warning in report.warnings)
    assert (report.exact, report.bound, report.original) == (False, None, None)
    assert report.strategy == expected.strategy
    assert "could not be measured" in report.exactness()
    assert "could not be measured" in (tmp_path / "again" / "subtract_report.md").read_text()
    assert read_checkpoint(tmp_path / "again") == read_checkpoint(tmp_path / "expected")


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
def test_paths_that_are_no_utf8_work(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff"))
    adapter = make_adapter(odd / "adapter")
    report = lorafast.merge(base, adapter, odd / "out")
    assert report.warnings == []
    written = json.loads((odd / "out" / "merge_report.json").read_text())
    assert written["output_path"] == "out"
    flags = ["--base", str(base), "--adapters", str(adapter), "--output", str(odd / "again")]
    assert main(["merge", *flags]) == 0
    assert main(["merge", *flags, "--overwrite", "--json"]) == 0
    assert lorafast.subtract(odd / "out", adapter, odd / "back").warnings == []
    assert "Traceback" not in capsys.readouterr().err


def test_the_home_directory_in_an_output_is_expanded(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    report = lorafast.merge(base, adapter, "~/merged")
    assert report.output_path == str(home / "merged")
    lorafast.subtract("~/merged", adapter, Path("~/back"))
    lorafast.LoRAAnalyzer("~/runs")
    commands = [
        ["merge", "--base", str(base), "--adapters", str(adapter), "--output", "~/by-command"],
        ["analyze", str(adapter), "--no-plots", "--output", "~/analysis"],
        ["compare", str(adapter), str(adapter), "--no-plots", "--output", "~/comparison"],
        ["report", "~/analysis"],
        ["scan", str(adapter), "--output", "~/tables", "--cache", "~/cache"],
        ["similarity", str(adapter), "--output", "~/similar.csv", "--cache", "~/similar"],
    ]
    for command in commands:
        assert main(command) == 0, command
    assert list(here.iterdir()) == []
    made = {*("merged", "back", "runs", "by-command", "analysis", "comparison", "tables")}
    made |= {"cache", "similar.csv", "similar"}
    # matplotlib keeps hidden directories of its own there.
    assert {path.name for path in home.iterdir() if path.name[0] != "."} == made


def test_one_field_to_allow_is_one_field(base: Path, tmp_path: Path) -> None:
    odd = make_adapter(tmp_path / "odd", config={**adapter_config(), "sparkle": True})
    with pytest.raises(lorafast.AdapterError, match="sparkle"):
        lorafast.plan(base, odd)
    lorafast.plan(base, odd, allow="sparkle")
    lorafast.merge(base, odd, tmp_path / "out", allow="sparkle")
    assert lorafast.verify(base, odd, tmp_path / "out", allow="sparkle").ok
    lorafast.subtract(tmp_path / "out", odd, tmp_path / "back", allow="sparkle")


# --- what NeuroTrain's options touch -------------------------------------------------------


def test_files_that_the_merge_did_not_write_stay(base: Path, adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    analyzer = lorafast.LoRAAnalyzer(tmp_path / "runs")
    analyzer.merge_adapters(base, adapter, "model")
    model = analyzer.merge_dir / "model"
    bystanders = {"notes.tiktoken": "mine", "vocab.txt": "mine", "other-lora.safetensors": "mine"}
    for name, content in bystanders.items():
        (model / name).write_text(content)
    # What the merge does about them is its own matter; here they have come after it.
    from lorafast._merge import merged_files

    report = lorafast.merge(base, adapter, tmp_path / "out")
    for name, content in bystanders.items():
        (tmp_path / "out" / name).write_text(content)
    assert "tokenizer.json" in report.side_files
    assert report.weight_files == ["model.safetensors"]
    shorter = merged_files.remove_tokenizer(tmp_path / "out", report)
    changed = merged_files.rewrite_as_pickles(tmp_path / "out", shorter)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert changed.weight_files == ["pytorch_model.bin"]
    for name, content in bystanders.items():
        assert (tmp_path / "out" / name).read_text() == content
    written = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert written["weight_files"] == ["pytorch_model.bin"]
    assert "tokenizer.json" not in written["side_files"]
