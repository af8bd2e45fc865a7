"""The names, keys and files that users of NeuroTrain's tools rely on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast import analyzers
from support.files import read_safetensors, tensor
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base

PROJECT = Path(__file__).resolve().parents[2]
MERGE_KEYS = [
    "base_model",
    "adapters",
    "merge_strategy",
    "weights",
    "output_path",
    "model_size_mb",
    "total_parameters",
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", shards=3)


@pytest.fixture
def style(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "style")


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "facts", adapter_tensors(rank=2, seed=9), r=2)


@pytest.fixture
def analyzer(tmp_path: Path) -> lorafast.LoRAAnalyzer:
    return lorafast.LoRAAnalyzer(output_dir=tmp_path / "runs")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pixels(path: Path) -> tuple[int, ...]:
    from matplotlib.image import imread

    return tuple(imread(path).shape)


def test_the_names_stand_in_both_places() -> None:
    for name in analyzers.__all__:
        assert getattr(lorafast, name) is getattr(analyzers, name)


def test_the_directories_are_made(tmp_path: Path) -> None:
    analyzer = lorafast.LoRAAnalyzer(
        str(tmp_path / "runs"), "auto", use_proxy=True, trust_remote_code=True
    )
    assert names_in(tmp_path / "runs") == ["analysis", "merged_models", "visualizations"]
    assert analyzer.merge_dir == tmp_path / "runs" / "merged_models"
    assert analyzer.analysis_dir == tmp_path / "runs" / "analysis"
    assert analyzer.visualization_dir == tmp_path / "runs" / "visualizations"


def test_an_analysis_has_the_keys_and_files(analyzer: lorafast.LoRAAnalyzer, style: Path) -> None:
    result = analyzer.analyze_lora_weights(str(style))
    assert list(result) == ["adapter_path", "config", "weight_statistics", "layer_analysis"]
    assert result["adapter_path"] == str(style)
    assert result["config"] == json.loads((style / "adapter_config.json").read_text())
    stored = read_safetensors(style / "adapter_model.safetensors")
    values = np.concatenate([value.float64().ravel() for value in stored.values()])
    statistics = result["weight_statistics"]
    keys = ["total_parameters", "mean", "std", "min", "max", "percentiles"]
    assert list(statistics) == keys
    assert statistics["total_parameters"] == values.size
    assert statistics["mean"] == pytest.approx(values.mean(), rel=1e-10)
    assert statistics["std"] == pytest.approx(values.std(), rel=1e-12)
    assert list(statistics["percentiles"]) == ["25th", "50th", "75th", "95th", "99th"]
    expected = np.percentile(values, [25, 50, 75, 95, 99]).tolist()
    assert list(statistics["percentiles"].values()) == expected
    layers = result["layer_analysis"]
    assert list(layers) == [f"base_model.model.{path}" for path in MODULES]
    for layer, tensors in layers.items():
        assert sorted(tensors) == [f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"]
        for name, figures in tensors.items():
            assert list(figures) == ["mean", "std", "min", "max", "shape"]
            assert figures["shape"] == list(stored[name].shape)
            assert figures["max"] == stored[name].float64().max()

    assert names_in(analyzer.analysis_dir) == ["style_analysis.json"]
    written = json.loads((analyzer.analysis_dir / "style_analysis.json").read_text())
    assert {key: written[key] for key in result} == result
    assert set(written["modules"]) == set(MODULES)
    pictures = names_in(analyzer.visualization_dir)
    assert {"style_weight_analysis.png", "style_weight_heatmap.png"} <= set(pictures)
    for picture in pictures:
        assert min(pixels(analyzer.visualization_dir / picture)[:2]) > 200


def test_plots_may_be_left_out(analyzer: lorafast.LoRAAnalyzer, style: Path) -> None:
    analyzer.analyze_lora_weights(style, save_plots=False)
    analyzer.compare_adapters([style, style], save_plots=False)
    assert names_in(analyzer.visualization_dir) == []


def test_without_matplotlib_only_the_pictures_are_missing(
    analyzer: lorafast.LoRAAnalyzer, style: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("lorafast._report.plots")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match="pip install"):
        result = analyzer.analyze_lora_weights(style)
    assert result["weight_statistics"]["total_parameters"] > 0
    assert names_in(analyzer.visualization_dir) == []
    assert names_in(analyzer.analysis_dir) == ["style_analysis.json"]


def test_a_comparison_has_the_keys_and_files(
    analyzer: lorafast.LoRAAnalyzer, style: Path, facts: Path
) -> None:
    result = analyzer.compare_adapters([str(style), str(facts)])
    assert list(result) == ["adapters", "comparison_data"]
    assert result["adapters"] == [str(style), str(facts)]
    assert list(result["comparison_data"]) == ["style", "facts"]
    single = lorafast.LoRAAnalyzer(analyzer.output_dir / "2").analyze_lora_weights(str(style))
    assert result["comparison_data"]["style"] == single
    written = json.loads((analyzer.analysis_dir / "adapter_comparison.json").read_text())
    assert {key: written[key] for key in result} == result
    assert np.array(written["cosine"]).shape == (2, 2)
    pictures = names_in(analyzer.visualization_dir)
    assert {"adapter_comparison.png", "weight_distribution_comparison.png"} <= set(pictures)


def test_two_of_one_base_name_do_not_overwrite_each_other(
    analyzer: lorafast.LoRAAnalyzer, tmp_path: Path
) -> None:
    one = make_adapter(tmp_path / "run-1" / "final")
    two = make_adapter(tmp_path / "run-2" / "final", adapter_tensors(seed=5))
    result = analyzer.compare_adapters([one, two], save_plots=False)
    assert list(result["comparison_data"]) == ["run-1_final", "run-2_final"]
    for path in (one, two, one):
        analyzer.analyze_lora_weights(path, save_plots=False)
    files = [name for name in names_in(analyzer.analysis_dir) if name.endswith("_analysis.json")]
    # Analysed alone, the first has its plain name, the second its parent's before it.
    assert files == [
        "final_analysis.json",
        "run-1_final_analysis.json",
        "run-2_final_analysis.json",
    ]
    for name, path in (("final", one), ("run-2_final", two)):
        written = json.loads((analyzer.analysis_dir / f"{name}_analysis.json").read_text())
        assert written["adapter_path"] == str(path)


def test_a_later_analyzer_does_not_overwrite_an_earlier_ones_files(tmp_path: Path) -> None:
    adapters = [
        make_adapter(tmp_path / run / "final", adapter_tensors(seed=seed))
        for seed, run in enumerate(("run-1", "run-2", "run-3"))
    ]
    output = tmp_path / "analyses"
    for adapter in [*adapters, *adapters]:
        lorafast.analyze_lora_weights(adapter, output_dir=output, save_plots=False)
    files = {path.name: json.loads(path.read_text()) for path in (output / "analysis").iterdir()}
    assert {name: entry["adapter_path"] for name, entry in files.items()} == {
        "final_analysis.json": str(adapters[0]),
        "run-2_final_analysis.json": str(adapters[1]),
        "run-3_final_analysis.json": str(adapters[2]),
    }


def test_a_linked_adapter_is_called_as_it_was_given(
    analyzer: lorafast.LoRAAnalyzer, tmp_path: Path, style: Path, facts: Path
) -> None:
    """As links into a store of blobs are, whose names say nothing."""
    links = [tmp_path / "links" / name for name in ("a-style", "b-facts")]
    links[0].parent.mkdir()
    for link, target in zip(links, (style, facts), strict=True):
        link.symlink_to(target, target_is_directory=True)
    result = analyzer.compare_adapters([str(link) for link in links], save_plots=False)
    assert list(result["comparison_data"]) == ["a-style", "b-facts"]
    alone = lorafast.LoRAAnalyzer(tmp_path / "alone")
    for path in (links[0], style, links[0]):
        alone.analyze_lora_weights(path, save_plots=False)
    files = names_in(alone.analysis_dir)
    assert files == ["a-style_analysis.json", "style_analysis.json"]
    assert lorafast.analyze(links[1]).name == "b-facts"
    assert lorafast.compare(links).names == ["a-style", "b-facts"]


def test_the_report_has_the_sections(analyzer: lorafast.LoRAAnalyzer, style: Path) -> None:
    text = analyzer.generate_report(analyzer.analyze_lora_weights(style, save_plots=False))
    assert (analyzer.analysis_dir / "analysis_report.md").read_text() == text
    lines = text.splitlines()
    assert lines[0] == "# LoRA Analysis Report"
    assert any(line.startswith("**Analysis Date**") for line in lines)
    order = [lines.index(line) for line in ("## Summary", "## Layer Analysis")]
    sections = [index for index, line in enumerate(lines) if line.startswith("### ")]
    assert order[0] < order[1] < sections[0]
    assert len(sections) == len(MODULES)
    assert len(lines) < 200


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"merge_strategy": "weighted", "weights": [0.7, -0.3]},
        {"merge_strategy": "weighted"},
        {"merge_strategy": "average"},
    ],
)
def test_a_merge_is_lorafasts(
    analyzer: lorafast.LoRAAnalyzer,
    base: Path,
    style: Path,
    facts: Path,
    options: dict[str, Any],
) -> None:
    info = analyzer.merge_adapters(str(base), [str(style), str(facts)], "mixed", **options)
    assert list(info) == MERGE_KEYS
    output = analyzer.merge_dir / "mixed"
    assert info["output_path"] == str(output)
    assert info["base_model"] == str(base)
    assert info["adapters"] == [str(style), str(facts)]
    assert json.loads((output / "merge_info.json").read_text()) == info
    assert (output / "tokenizer.json").exists()
    expected = base.parent / "expected"
    strategy = options.get("merge_strategy", "sequential")
    assert info["merge_strategy"] == strategy
    lorafast.merge(
        base, [style, facts], expected, strategy=strategy, weights=options.get("weights")
    )
    shards = sorted(expected.glob("*.safetensors"))
    assert len(shards) == 3
    for shard in shards:
        assert (output / shard.name).read_bytes() == shard.read_bytes()


def test_a_merge_may_be_repeated_under_its_name(
    analyzer: lorafast.LoRAAnalyzer, base: Path, style: Path
) -> None:
    first = analyzer.merge_adapters(base, style, "again")
    assert analyzer.merge_adapters(base, style, "again", save_safetensors=False) == first
    assert not list((analyzer.merge_dir / "again").glob("*.safetensors"))


@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files_hold_the_same_tensors(
    analyzer: lorafast.LoRAAnalyzer, tmp_path: Path, style: Path, shards: int
) -> None:
    torch = pytest.importorskip("torch")
    base = make_base(tmp_path / "other", shards=shards)
    expected = tmp_path / "expected"
    lorafast.merge(base, style, expected)
    stored: dict[str, Any] = {}
    for file in expected.glob("*.safetensors"):
        stored |= read_safetensors(file)
    analyzer.merge_adapters(base, style, "pickled", save_safetensors=False, save_tokenizer=False)
    output = analyzer.merge_dir / "pickled"
    found: dict[str, Any] = {}
    for file in output.glob("*.bin"):
        part = torch.load(file, weights_only=True)
        found |= dict.fromkeys(part, file.name)
        for name, value in part.items():
            np.testing.assert_array_equal(value.double().numpy(), stored[name].float64())
    assert set(found) == set(stored)
    files = set(names_in(output))
    assert not any("safetensors" in name or name.startswith("tokenizer") for name in files)
    report = json.loads((output / "merge_report.json").read_text())
    assert not any(name.startswith("tokenizer") for name in report["side_files"])
    if shards == 1:
        assert {"pytorch_model.bin", "config.json"} <= files
    else:
        index = json.loads((output / "pytorch_model.bin.index.json").read_text())
        assert index["weight_map"] == found
        assert "pytorch_model-00001-of-00003.bin" in files
    listed = json.loads((output / "lorafast_manifest.json").read_text())["files"]
    reports = {"merge_report.json", "merge_report.md", "merge_info.json", "lorafast_manifest.json"}
    assert {entry["name"] for entry in listed} == files - reports
    assert all((output / entry["name"]).stat().st_size == entry["bytes"] for entry in listed)
    # A model written over it leaves none of its files.
    lorafast.merge(base, style, output, overwrite=True, report=False)
    assert not [path.name for path in output.iterdir() if ".bin" in path.name]


def test_bin_files_load_in_transformers(tmp_path: Path, models: Any) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    base = models.llama()
    factors = {"model.layers.0.self_attn.q_proj": (72, 72)}
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(factors))
    analyzer = lorafast.LoRAAnalyzer(tmp_path / "runs")
    logits = []
    for name, safe in (("safe", True), ("bin", False)):
        analyzer.merge_adapters(base, adapter, name, save_safetensors=safe)
        model = transformers.AutoModelForCausalLM.from_pretrained(analyzer.merge_dir / name)
        with torch.no_grad():
            logits.append(model(torch.arange(12).reshape(1, 12)).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", "torch"])
def test_the_dtype_may_be_a_name_or_torchs(
    analyzer: lorafast.LoRAAnalyzer, base: Path, style: Path, dtype: str
) -> None:
    chosen = pytest.importorskip("torch").bfloat16 if dtype == "torch" else dtype
    analyzer.merge_adapters(base, style, "m", merge_dtype=chosen)
    for file in (analyzer.merge_dir / "m").glob("*.safetensors"):
        assert {value.dtype for value in read_safetensors(file).values()} == {"BF16"}


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp/x"])
def test_a_merge_stays_in_its_directory(
    analyzer: lorafast.LoRAAnalyzer, base: Path, style: Path, name: str
) -> None:
    with pytest.raises(ValueError, match="output_name"):
        analyzer.merge_adapters(base, style, name)


def test_a_wrong_number_of_weights_is_an_error(
    analyzer: lorafast.LoRAAnalyzer, base: Path, style: Path
) -> None:
    with pytest.raises(ValueError, match="weights"):
        analyzer.merge_adapters(base, [style], "m", "weighted", weights=[1.0, 2.0])
    assert names_in(analyzer.merge_dir) == []


def test_local_files_only_never_asks_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    seen: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        seen.append(options)
        return str(make_adapter(tmp_path / "cached"))

    monkeypatch.setattr(hub, "snapshot_download", download)
    analyzer = lorafast.LoRAAnalyzer(tmp_path / "runs", local_files_only=True)
    analyzer.analyze_lora_weights("owner/style", save_plots=False)
    assert [options["local_files_only"] for options in seen] == [True]
    assert names_in(analyzer.analysis_dir) == ["style_analysis.json"]


def test_the_unified_analyzer_and_the_functions(
    tmp_path: Path, base: Path, style: Path, facts: Path
) -> None:
    unified = lorafast.UnifiedAnalyzer(tmp_path / "unified")
    by_function = {"output_dir": tmp_path / "functions"}
    one = unified.analyze_lora_weights(style, save_plots=False)
    two = lorafast.analyze_lora_weights(style, save_plots=False, **by_function)
    assert one == two
    one = unified.compare_lora_adapters([style, facts], save_plots=False)
    two = lorafast.compare_lora_adapters([style, facts], save_plots=False, **by_function)
    assert one == two
    one = unified.merge_lora_adapters(base, [style], "m", merge_strategy="average")
    two = lorafast.merge_lora_adapters(base, [style], "m", merge_strategy="average", **by_function)
    assert one["output_path"] == str(tmp_path / "unified" / "merged_models" / "m")
    assert {**one, "output_path": ""} == {**two, "output_path": ""}


def test_a_saved_tensor_is_a_layer_of_its_own(
    analyzer: lorafast.LoRAAnalyzer, tmp_path: Path
) -> None:
    others = {"base_model.model.lm_head.weight": tensor(np.ones((3, 4)))}
    adapter = make_adapter(
        tmp_path / "saved", adapter_tensors() | others, modules_to_save=["lm_head"]
    )
    layers = analyzer.analyze_lora_weights(adapter, save_plots=False)["layer_analysis"]
    name = "base_model.model.lm_head.weight"
    assert layers[name][name]["shape"] == [3, 4]


def test_the_example_runs(tmp_path: Path, base: Path, style: Path, facts: Path) -> None:
    script = PROJECT / "examples" / "neurotrain_tools.py"
    output = tmp_path / "runs"
    arguments = [str(base), str(style), str(facts), "--output", str(output)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "merged:" in done.stdout
    for name in (
        "analysis/style_analysis.json",
        "analysis/analysis_report.md",
        "analysis/adapter_comparison.json",
        "merged_models/weighted_model/merge_info.json",
        "unified/merged_models/average_model/merge_info.json",
        "visualizations/style_weight_analysis.png",
        "visualizations/weight_distribution_comparison.png",
        "quick/analysis/style_analysis.json",
    ):
        assert (output / name).is_file(), name
