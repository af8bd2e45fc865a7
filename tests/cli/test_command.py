"""The command as its users meet it: exit codes, streams, tables, JSON."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lorafast
import pytest
from lorafast._cli import demo_inputs
from lorafast._cli.format import bytes_text, count_text, seconds_text
from lorafast._cli.main import main
from lorafast._cli.patterns import collapse
from lorafast._cli.terminal import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

TINY = demo_inputs.ModelShape(
    hidden=64, intermediate=96, layers=3, heads=4, key_value_heads=2, vocabulary=320, shards=2
)
MERGE_FLAGS = [
    "--base",
    "--adapters",
    "--output",
    "--strategy",
    "--weights",
    "--dtype",
    "--device",
    "--threads",
    "--dry-run",
    "--overwrite",
    "--no-report",
    "--json",
    "--quiet",
]
REPORTS = {"README.md", "merge_report.json", "merge_report.md"}
MANIFEST = "lorafast_manifest.json"


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> demo_inputs.DemoInputs:
    """A sharded bf16 Llama of toy size and two adapters. Read-only."""
    return demo_inputs.make_inputs(tmp_path_factory.mktemp("inputs"), TINY)


@pytest.fixture
def style(inputs: demo_inputs.DemoInputs) -> list[str]:
    """The flags for merging the first adapter."""
    return ["merge", "--base", str(inputs.base), "--adapters", str(inputs.adapters[0])]


@pytest.fixture
def both(inputs: demo_inputs.DemoInputs) -> list[str]:
    """The flags for merging both adapters."""
    return ["merge", "--base", str(inputs.base), "--adapters", *map(str, inputs.adapters)]


@pytest.fixture
def untrained(inputs: demo_inputs.DemoInputs, tmp_path: Path) -> Path:
    """The second adapter with every B zero."""
    adapter = tmp_path / "untrained"
    shutil.copytree(inputs.adapters[1], adapter)
    file = adapter / "adapter_model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    names = [name for name in json.loads(file.read_bytes()[8 : 8 + length]) if name[0] != "_"]
    tensors = {name: demo_inputs.read_tensor(file, name) for name in names}
    for name, values in tensors.items():
        if "lora_B" in name:
            values.fill(0)
    demo_inputs.write_safetensors(file, tensors)
    return adapter


def command(arguments: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorafast", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def on_a_terminal(arguments: Sequence[str]) -> tuple[int, str]:
    """Run the command with a terminal of 120 columns for its streams; exit code and output."""
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        environment.pop(name, None)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "lorafast", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux reports the end of a terminal's output as an I/O error
            break
        if not chunk:
            break
        output += chunk
    os.close(ours)
    return process.wait(timeout=120), output.decode()


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# Starting


def test_version_is_printed_without_importing_anything_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lorafast", "--version"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == f"lorafast {lorafast.__version__}\n"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "lorafast._core" in imported
    heavy = {"numpy", "rich", "rich_argparse", "torch", "matplotlib", "transformers", "safetensors"}
    assert not imported & heavy


def test_help_names_every_command_and_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(re.search(rf"^ +{name} ", overview, re.MULTILINE) for name in ("merge", "inspect"))
    assert main(["merge", "--help"]) == 0
    merge_help = capsys.readouterr().out
    shown = re.findall(r"^  (?:-\w(?: \w+[^,\n]*)?, )?(--[\w-]+)", merge_help, re.MULTILINE)
    assert [flag for flag in MERGE_FLAGS if flag not in shown] == []
    assert main(["inspect", "--help"]) == 0
    inspect_help = capsys.readouterr().out
    assert all(flag in inspect_help for flag in ("PATH", "--tensors", "--json"))


def test_no_command_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "merge" in streams.err


# Wrong flags and bad input


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        (["--nonsense"], "--nonsense"),
        (["--strategy", "tie"], "'tie'"),
        (["--dtype", "int8"], "'int8'"),
        (["--device", "tpu"], "'tpu'"),
        (["--strategy", "weighted", "--weights", "much"], "'much'"),
        (["--weights"], "--weights"),
        (["--threads", "two"], "'two'"),
    ],
)
def test_a_wrong_flag_exits_with_2(
    style: list[str],
    extra: list[str],
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*style, "--output", str(tmp_path / "out"), *extra]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("usage: lorafast")
    errors = [line for line in streams.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert complaint in errors[0]
    assert not (tmp_path / "out").exists()


def test_output_may_be_left_out_of_a_dry_run_only(
    style: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(style) == 2
    assert "--output" in capsys.readouterr().err
    assert main([*style, "--dry-run"]) == 0


def test_a_missing_base_is_one_line_with_its_path(tmp_path: Path) -> None:
    missing = str(tmp_path / "no" / "model")
    done = command(["merge", "--base", missing, "--adapters", missing, "--output", "out"])
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"error: .*\n", done.stderr)
    assert missing in done.stderr


@pytest.mark.parametrize(
    "extra",
    [
        ["--strategy", "sequential", "--weights", "0.5", "0.5"],
        ["--strategy", "weighted", "--weights", "0.5"],
        ["--strategy", "weighted", "--weights", "0.5", "-inf"],
        ["--strategy", "weighted", "--weights", "0.5", "nan"],
        ["--threads", "0"],
    ],
)
def test_bad_values_are_one_line_and_nothing_is_written(
    both: list[str], extra: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*both, "--output", str(tmp_path / "out"), *extra]) == 1
    streams = capsys.readouterr()
    assert streams.out == ""
    assert re.fullmatch(r"error: .*\n", streams.err)
    assert names_in(tmp_path) == set()


def test_an_output_that_exists_needs_overwrite(
    style: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    output = ["--output", str(tmp_path)]
    assert main([*style, *output]) == 1
    assert re.fullmatch(r"error: .*\n", capsys.readouterr().err)
    assert names_in(tmp_path) == {"mine.txt"}
    assert main([*style, *output, "--dry-run"]) == 0
    assert "warning: " in capsys.readouterr().err
    assert main([*style, *output, "--overwrite"]) == 0
    assert "model.safetensors.index.json" in names_in(tmp_path)


def test_many_problems_are_one_line(
    inputs: demo_inputs.DemoInputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smaller = demo_inputs.make_inputs(tmp_path / "smaller", replace(TINY, hidden=32))
    flags = ["--base", str(smaller.base), "--adapters", str(inputs.adapters[1])]
    assert main(["merge", *flags, "--dry-run"]) == 1
    assert re.fullmatch(r"error: 6 problems: .*; .*; .*; and 3 more\n", capsys.readouterr().err)


def test_an_error_cannot_command_the_terminal(
    style: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        message = "first\n  second \x1b[31m"
        raise ValueError(message)

    monkeypatch.setattr(lorafast, "plan", fail)
    assert main([*style, "--dry-run"]) == 1
    assert capsys.readouterr().err == "error: first second \\x1b[31m\n"


def test_a_bug_is_not_dressed_up_as_an_error(
    style: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError

    monkeypatch.setattr(lorafast, "plan", fail)
    with pytest.raises(TypeError):
        main([*style, "--dry-run"])


def test_ctrl_c_exits_with_130(
    style: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lorafast, "merge", interrupt)
    assert main([*style, "--output", "out"]) == 130
    streams = capsys.readouterr()
    assert (streams.out, streams.err) == ("", "interrupted\n")


@pytest.mark.parametrize("form", ["--tensors", "--json"])
def test_a_closed_pipe_is_no_error(inputs: demo_inputs.DemoInputs, form: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "lorafast", "inspect", str(inputs.base), form],
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")


# Merging


def test_merge_ends_with_a_table_and_is_silent_on_stderr(
    both: list[str], inputs: demo_inputs.DemoInputs, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    weighted = ["--strategy", "weighted", "--weights", "0.7", "-0.3"]
    done = command([*both, *weighted, "--output", str(output)])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Merged 2 adapters into {output}\n")
    assert "21 merged, 9 copied" in done.stdout
    assert "× 0.7" in done.stdout
    assert "× -0.3" in done.stdout
    assert re.search(r"\d [kMG]?B/s", done.stdout)
    assert "\x1b" not in done.stdout
    assert names_in(output) == names_in(inputs.base) | REPORTS | {MANIFEST}
    merged = demo_inputs.DemoInputs(inputs.directory, inputs.shape, output)
    assert [check.name for check in demo_inputs.check_merge(merged) if not check.ok] == []


def test_quiet_prints_nothing(style: list[str], tmp_path: Path) -> None:
    done = command([*style, "--output", str(tmp_path / "out"), "--quiet"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out" / "config.json").is_file()


def test_no_report_leaves_the_reports_out(
    style: list[str], inputs: demo_inputs.DemoInputs, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert main([*style, "--output", str(output), "--no-report"]) == 0
    assert names_in(output) == names_in(inputs.base) | {MANIFEST}


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_json_is_all_of_stdout(style: list[str], quiet: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = command([*style, "--output", str(output), "--json", *quiet])
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["tensors_merged"] == 21
    assert report["strategy"] == "sequential"
    assert Path(report["output_path"]) == output


def test_a_warning_is_a_line_on_stderr_even_if_quiet(
    inputs: demo_inputs.DemoInputs, untrained: Path, tmp_path: Path
) -> None:
    flags = ["merge", "--base", str(inputs.base), "--adapters", str(untrained)]
    for extra in (["--dry-run"], ["--output", str(tmp_path / "out"), "--quiet"]):
        done = command([*flags, *extra])
        assert done.returncode == 0
        lines = done.stderr.splitlines()
        assert lines
        assert all(line.startswith("warning: ") for line in lines)
        assert len(lines) == len(set(lines))


def test_progress_and_tables_are_drawn_on_a_terminal(style: list[str], tmp_path: Path) -> None:
    status, shown = on_a_terminal([*style, "--output", str(tmp_path / "out")])
    assert status == 0
    assert "merging" in shown
    assert "\x1b[" in shown
    assert "Merged 1 adapter into" in shown
    status, shown = on_a_terminal([*style, "--output", str(tmp_path / "quiet"), "--quiet"])
    assert (status, shown) == (0, "")


# Dry run


def test_dry_run_shows_what_changes_at_which_scale(
    both: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weighted = ["--strategy", "weighted", "--weights", "0.7", "-1e-3"]
    assert main([*both, *weighted, "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert names_in(tmp_path) == set()
    assert re.search(r"tensors +21 of 30 change", shown)
    style, rest = shown.split("style changes 21 tensors: low-rank, rank 16, scale 2, weight 0.7\n")
    assert "tokenizer.json" in style
    # 16 / sqrt(8)
    facts = "facts changes 6 tensors: low-rank, rank 8, scale 5.65685, weight -0.001\n"
    style, rest = rest.split(facts)
    facts, unchanged = rest.split("9 tensors no adapter changes\n")
    assert re.search(r" 3 +model\.layers\.\{0-2\}\.mlp\.down_proj\.weight\n", style)
    assert re.search(r" 3 +model\.layers\.\{0-2\}\.self_attn\.v_proj\.weight\n", facts)
    assert "down_proj" not in facts
    assert re.search(r" 3 +model\.layers\.\{0-2\}\.input_layernorm\.weight +BF16\n", unchanged)


def test_dry_run_as_json_is_the_plan(
    both: list[str], inputs: demo_inputs.DemoInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*both, "--strategy", "average", "--dry-run", "--json"]) == 0
    plan = lorafast.plan(inputs.base, inputs.adapters, strategy="average")
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(plan.to_dict()))


@pytest.mark.parametrize(
    ("texts", "weights"),
    [
        (["0.7", "-0.3"], [0.7, -0.3]),
        (["-1e-3", "-.5"], [-0.001, -0.5]),
        (["-2", "-1E+2"], [-2.0, -100.0]),
        (["+1.5", "-1."], [1.5, -1.0]),
    ],
)
def test_weights_may_be_negative_in_any_notation(
    both: list[str],
    texts: list[str],
    weights: list[float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    weighted = ["--strategy", "weighted", "--weights", *texts]
    assert main([*both, *weighted, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == weights


# Info


def test_inspect_shows_a_checkpoint(
    inputs: demo_inputs.DemoInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(inputs.base)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Checkpoint {inputs.base}\n")
    assert "LlamaForCausalLM" in shown
    assert "30 in 2 files" in shown
    assert "model-00002-of-00002.safetensors" in shown
    assert re.search(r" 3 +model\.layers\.\{0-2\}\.mlp\.up_proj\.weight +BF16 +96 × 64", shown)


def test_inspect_lists_every_tensor_on_request(
    inputs: demo_inputs.DemoInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(inputs.base), "--tensors"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in TINY.tensors() if f" {name} " not in shown] == []


def test_inspect_shows_an_adapter(
    inputs: demo_inputs.DemoInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(inputs.adapters[1])]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Adapter {inputs.adapters[1]}\n")
    assert "alpha / √rank" in shown
    assert re.search(r" 3 +model\.layers\.\{0-2\}\.self_attn\.v_proj +8 +16 +5\.65685 +", shown)


def test_inspect_as_json_is_what_inspect_returns(
    inputs: demo_inputs.DemoInputs, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (inputs.base, inputs.base / "model-00001-of-00002.safetensors", *inputs.adapters):
        assert main(["inspect", str(path), "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown == json.loads(lorafast.inspect(path).to_json())


def test_inspect_on_nothing_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    assert re.fullmatch(r"error: .*\n", capsys.readouterr().err)


# Demo


def test_demo_merges_and_proves_the_result(tmp_path: Path) -> None:
    done = command(["demo"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "$ lorafast merge --base lorafast-demo/base" in done.stdout
    assert "model.layers.{0-3}.mlp.down_proj.weight" in done.stdout
    assert "Right: " in done.stdout
    assert names_in(tmp_path / "lorafast-demo") >= {"base", "style", "facts", "merged"}


def test_demo_sees_a_wrong_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_merge = lorafast.merge

    def merge_at_another_weight(*arguments: Any, **options: Any) -> lorafast.MergeReport:
        options["weights"] = [0.7, -0.31]
        return real_merge(*arguments, **options)

    monkeypatch.setattr(lorafast, "merge", merge_at_another_weight)
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 1
    shown = capsys.readouterr().out
    assert "WRONG: model.layers.0.self_attn.q_proj.weight" in shown
    assert "Right" not in shown


def test_demo_spares_a_directory_that_is_not_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base").mkdir()
    assert main(["demo", "--output", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert names_in(tmp_path) == {"base"}


# Small parts


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (["norm.weight"], [("norm.weight", 1)]),
        (["h.0.a", "h.1.a", "h.2.a"], [("h.{0-2}.a", 3)]),
        (["h.0.a", "h.1.a", "h.3.a"], [("h.{0,1,3}.a", 3)]),
        (["h.7.a"], [("h.7.a", 1)]),
        (["h.1.b", "h.0.a", "h.0.b"], [("h.{0,1}.b", 2), ("h.0.a", 1)]),
        (
            [f"h.{layer}.e.{expert}.w1" for layer in range(3) for expert in range(4)],
            [("h.{0-2}.e.{0-3}.w1", 12)],
        ),
        (
            ["h.0.e.0", "h.0.e.1", "h.1.e.0", "h.2.e.0", "h.2.e.1"],
            [("h.{0,2}.e.{0,1}", 4), ("h.1.e.0", 1)],
        ),
        (["blocks_0_fc1", "blocks_11_fc1"], [("blocks_{0,11}_fc1", 2)]),
        (["w_007", "w_008", "w_009", "w_7"], [("w_{007-009}", 3), ("w_7", 1)]),
    ],
)
def test_patterns_stand_for_exactly_their_names(
    names: list[str], patterns: list[tuple[str, int]]
) -> None:
    assert collapse(names) == patterns


def test_numbers_read_well() -> None:
    assert [bytes_text(size) for size in (0, 999, 1000, 999_960, 2.5e9, 3e15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.0 MB",
        "2.5 GB",
        "3000.0 TB",
    ]
    assert [count_text(count) for count in (0, 999_999, 1_235_814_400)] == [
        "0",
        "999,999",
        "1.24 B",
    ]
    assert [seconds_text(time) for time in (0.214, 125.4, 3725)] == [
        "0.21 s",
        "2 min 05 s",
        "1 h 02 min",
    ]


def test_names_cannot_command_the_terminal() -> None:
    assert printable("a\x1b[2J\nb × ü") == "a\\x1b[2J\\nb × ü"


def test_rounding_to_bfloat16_is_done_once() -> None:
    # Just above the middle between 1 and the next bfloat16; by way of float32 it is the middle,
    # which goes down to the even 1.
    import numpy as np

    value = np.array([1 + 2.0**-8 + 2.0**-40])
    assert demo_inputs.from_bfloat16(demo_inputs.round_to_bfloat16(value))[0] == 1 + 2.0**-7
    assert demo_inputs.from_bfloat16(demo_inputs.to_bfloat16(value.astype(np.float32)))[0] == 1
