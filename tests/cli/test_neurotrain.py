"""NeuroTrain's command lines and scripts run with the program's name or one import changed."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import lorafast
import pytest
from lorafast._cli.main import main
from support.files import read_safetensors
from support.handmade import adapter_tensors, make_adapter, make_base

Capture = pytest.CaptureFixture[str]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models and adapters of the examples."""
    make_base(tmp_path / "chatglm")
    for name in TOKENIZER:
        (tmp_path / "chatglm" / name).write_text("{}")
    for seed, name in enumerate(("lora_run1", "lora_run2")):
        make_adapter(tmp_path / "output" / name, adapter_tensors(seed=seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


BEGINNING = (
    "--base chatglm --adapters ./output/lora_run1 ./output/lora_run2 --output ./merged_model "
)
#: The command lines of the tool's own page and of its manual, and the same merge by its function.
LINES: list[tuple[str, dict[str, Any]]] = [
    (
        "--merge-dtype float16 --trust-remote-code --save-tokenizer --use-proxy",
        {"dtype": "float16"},
    ),
    (
        "--merge-strategy weighted --weights 0.7 0.3 --merge-dtype float16",
        {"strategy": "weighted", "weights": [0.7, 0.3], "dtype": "float16"},
    ),
    ("--merge-strategy average", {"strategy": "average"}),
    ("", {}),
    ("--merge-strategy weighted --weights 0.7 0.3", {"weights": [0.7, 0.3]}),
    ("--merge-strategy sequential --merge-dtype auto --device-map auto", {}),
    ("--device-map cpu --local-files-only --no-report", {}),
    *((f"--merge-dtype {name}", {"dtype": name}) for name in ("bf16", "fp16", "fp32", "bfloat16")),
]


@pytest.mark.parametrize(("flags", "options"), LINES, ids=[flags or "none" for flags, _ in LINES])
def test_each_command_line_runs_as_it_stands(
    flags: str, options: dict[str, Any], here: Path, capsys: Capture
) -> None:
    assert main(["merge", *shlex.split(BEGINNING + flags)]) == 0
    error = capsys.readouterr().err
    assert "error" not in error
    adapters = [here / "output" / "lora_run1", here / "output" / "lora_run2"]
    lorafast.merge(here / "chatglm", adapters, here / "same", **options)
    name = "model.safetensors"
    assert (here / "merged_model" / name).read_bytes() == (here / "same" / name).read_bytes()
    assert (here / "merged_model" / "tokenizer.json").is_file()
    has_report = "--no-report" not in flags
    assert (here / "merged_model" / "merge_report.md").exists() == has_report
    assert (here / "merged_model" / "merge_report.json").exists() == has_report
    said = [line.split() for line in error.splitlines()]
    for flag in ("--trust-remote-code", "--save-tokenizer", "--use-proxy"):
        (reason,) = [words for words in said if words[1:2] == [flag]] or [None]
        assert (reason is not None) == (flag in flags)
        if reason is not None:
            assert " ".join(reason).startswith(f"note: {flag} has no effect: ")
    assert "has no effect" not in error or "note: " in error


def test_the_report_has_the_tools_names(here: Path) -> None:
    line = BEGINNING + "--merge-strategy weighted --weights 0.7 0.3 --merge-dtype fp32"
    assert main(["merge", *shlex.split(line)]) == 0
    report = json.loads((here / "merged_model" / "merge_report.json").read_text())
    assert report["base_model"] == "chatglm"
    assert report["merge_strategy"] == "weighted"
    assert report["weights"] == [0.7, 0.3]
    assert report["merge_dtype"] == report["dtype"]
    assert len(report["adapters"]) == 2
    assert report["output_path"].endswith("merged_model")
    assert report["merge_time"] > 0
    assert report["model_size_mb"] > 0
    assert report["total_parameters"] > 0
    assert len(report["timestamp"]) == len("2026-01-01 00:00:00")


@pytest.mark.parametrize(
    ("value", "device"),
    [("cpu", "cpu"), ("auto", "auto"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), ("0", "cuda:0")],
)
def test_a_device_map_of_one_device_is_the_device(
    value: str, device: str, here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(
        lorafast, "merge", lambda *_, **options: heard.append(options["device"]) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        main(["merge", *shlex.split(BEGINNING), "--device-map", value])
    assert heard == [device]
    assert capsys.readouterr().err == "--device-map is called --device now\n"
    assert here.is_dir()


@pytest.mark.parametrize("value", ["balanced", "balanced_low_0", '{"": 0}', "gpu", ""])
def test_any_other_device_map_has_no_effect_and_says_so(
    value: str, here: Path, capsys: Capture
) -> None:
    assert main(["merge", *shlex.split(BEGINNING), "--device-map", value, "--quiet"]) == 0
    error = capsys.readouterr().err
    assert error.startswith(f"note: --device-map {value} has no effect: no model is loaded")
    assert error.count("\n") == 1
    assert (here / "merged_model" / "model.safetensors").is_file()


@pytest.mark.parametrize("report", [True, False])
def test_without_safetensors_the_model_is_written_by_torch(
    report: bool, here: Path, capsys: Capture
) -> None:
    torch = pytest.importorskip("torch")
    make_base(here / "shards", shards=3)
    for base in ("chatglm", "shards"):
        line = BEGINNING.replace("chatglm", base).replace("merged_model", f"merged_{base}")
        flags = ["--no-safetensors"] + ["--no-report"] * (not report)
        assert main(["merge", *shlex.split(line), *flags, "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        model = here / f"merged_{base}"
        adapters = [here / "output" / "lora_run1", here / "output" / "lora_run2"]
        lorafast.merge(here / base, adapters, here / f"same_{base}")
        expected, found = {}, {}
        for path in (here / f"same_{base}").glob("*.safetensors"):
            expected |= read_safetensors(path)
        assert not list(model.glob("*.safetensors"))
        for name in printed["weight_files"]:
            assert name.endswith(".bin")
            found |= torch.load(model / name, weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert value.double().numpy().tobytes() == expected[name].float64().tobytes()
        assert (model / "merge_report.json").exists() == report


def test_local_files_only_never_asks_the_hub(
    here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    heard: list[tuple[str, bool]] = []

    def fetch(name: str, *, local_files_only: bool, **_: object) -> str:
        heard.append((name, local_files_only))
        return str(here / "chatglm" if name == "owner/base" else here / "output" / "lora_run1")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    words = ["merge", "--base", "owner/base", "--adapters", "owner/adapter"]
    assert main([*words, "--output", "one", "--local-files-only"]) == 0
    assert list(dict.fromkeys(heard)) == [("owner/base", True), ("owner/adapter", True)]
    heard.clear()
    assert main([*words, "--output", "two"]) == 0
    assert list(dict.fromkeys(heard)) == [("owner/base", False), ("owner/adapter", False)]
    heard.clear()
    assert main([*words, "--dry-run", "--local-files-only"]) == 0
    assert list(dict.fromkeys(heard)) == [("owner/base", True), ("owner/adapter", True)]
    capsys.readouterr()


def test_notes_leave_json_and_errors_alone(here: Path, capsys: Capture) -> None:
    flags = ["--trust-remote-code", "--use-proxy", "--json"]
    assert main(["merge", *shlex.split(BEGINNING), *flags]) == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out)["strategy"] == "sequential"
    assert streams.err.splitlines()[:2] == [
        "note: --trust-remote-code has no effect: no code of a model or adapter is ever run",
        "note: --use-proxy has no effect: the hub's client takes the proxy of HTTPS_PROXY by "
        "itself",
    ]
    assert main(["merge", *shlex.split(BEGINNING), "--trust-remote-codes"]) == 2
    assert "did you mean --trust-remote-code?" in capsys.readouterr().err
    assert here.is_dir()


def test_what_takes_no_effect_is_not_in_the_help(capsys: Capture) -> None:
    assert main(["merge", "--help"]) == 0
    shown = set(capsys.readouterr().out.split())
    assert {"--local-files-only", "--no-safetensors"} <= shown
    assert not {"--trust-remote-code", "--use-proxy", "--save-tokenizer", "--device-map"} & shown


#: The scripts of the tools' manual, with their import changed, and what each leaves behind.
SCRIPTS = {
    "analyzer": (
        """
from tools.analyzers import LoRAAnalyzer

analyzer = LoRAAnalyzer(output_dir="runs/lora_analysis")
merge_info = analyzer.merge_adapters(
    base_model="chatglm",
    adapters=["./output/lora_run1", "./output/lora_run2"],
    output_name="merged_model",
    merge_strategy="weighted",
    weights=[0.7, 0.3],
)
analysis = analyzer.analyze_lora_weights("./output/lora_run1")
comparison = analyzer.compare_adapters(["./output/lora_run1", "./output/lora_run2"])
report = analyzer.generate_report(analysis)
""",
        [
            "runs/lora_analysis/merged_models/merged_model/merge_info.json",
            "runs/lora_analysis/analysis/lora_run1_analysis.json",
            "runs/lora_analysis/analysis/adapter_comparison.json",
            "runs/lora_analysis/analysis/analysis_report.md",
            "runs/lora_analysis/visualizations/lora_run1_weight_analysis.png",
            "runs/lora_analysis/visualizations/lora_run1_weight_heatmap.png",
            "runs/lora_analysis/visualizations/adapter_comparison.png",
            "runs/lora_analysis/visualizations/weight_distribution_comparison.png",
        ],
    ),
    "unified": (
        """
from tools.analyzers import UnifiedAnalyzer

analyzer = UnifiedAnalyzer(output_dir="runs/analysis")
analyzer.analyze_lora_weights("./output/lora_run1")
analyzer.merge_lora_adapters("chatglm", ["./output/lora_run1", "./output/lora_run2"], "merged")
analyzer.compare_lora_adapters(["./output/lora_run1", "./output/lora_run2"])
""",
        [
            "runs/analysis/merged_models/merged/model.safetensors",
            "runs/analysis/analysis/adapter_comparison.json",
        ],
    ),
    "functions": (
        """
from tools.analyzers import (
    analyze_lora_weights,
    merge_lora_adapters,
    compare_lora_adapters
)

analysis = analyze_lora_weights("./output/lora_run1")
merge_info = merge_lora_adapters("chatglm", ["./output/lora_run1", "./output/lora_run2"], "merged")
comparison = compare_lora_adapters(["./output/lora_run1", "./output/lora_run2"])
assert list(analysis) == ["adapter_path", "config", "weight_statistics", "layer_analysis"]
assert merge_info["merge_strategy"] == "sequential"
assert set(comparison["comparison_data"]) == {"lora_run1", "lora_run2"}
""",
        [
            "runs/lora_analysis/merged_models/merged/merge_info.json",
            "runs/lora_analysis/visualizations/lora_run1_weight_analysis.png",
        ],
    ),
    "results": (
        """
from tools.analyzers import LoRAAnalyzer

analyzer = LoRAAnalyzer("runs/own", device="auto", use_proxy=True, trust_remote_code=True,
                        local_files_only=False)
for adapter in ["output/lora_run1", "output/lora_run2"]:
    statistics = analyzer.analyze_lora_weights(adapter, save_plots=False)["weight_statistics"]
    print(statistics["total_parameters"], statistics["mean"], statistics["percentiles"]["95th"])
for strategy in ["sequential", "weighted", "average"]:
    info = analyzer.merge_adapters("chatglm", ["output/lora_run1"], strategy,
                                   merge_strategy=strategy, merge_dtype="fp16",
                                   save_tokenizer=False)
    print(info["output_path"], info["model_size_mb"], info["total_parameters"])
""",
        [f"runs/own/merged_models/{name}/model.safetensors"
         for name in ("sequential", "weighted", "average")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_runs_with_its_import_changed(name: str, here: Path) -> None:
    script, files = SCRIPTS[name]
    changed = script.replace("from tools.analyzers import", "from lorafast.analyzers import")
    assert changed != script
    exec(compile(changed, name, "exec"), {"__name__": "__main__"})
    for file in files:
        assert (here / file).is_file(), file
    assert "tools" not in sys.modules
