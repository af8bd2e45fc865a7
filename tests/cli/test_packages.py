"""Packages that are missing: asked for before any work, all in one message."""

from __future__ import annotations

import re
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import lorafast
import pytest
from lorafast._cli.main import main
from lorafast._io.packages import EXTRAS, extras_of, require
from support.handmade import make_adapter, make_base

PROJECT = Path(__file__).resolve().parents[2]
OPTIONAL = (
    "huggingface_hub",
    "matplotlib",
    "pandas",
    "plotly",
    "polars",
    "pyarrow",
    "scipy",
    "torch",
)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Hides packages, as if they were not installed."""

    def hide(*packages: str) -> None:
        for name in list(sys.modules):
            if name.split(".")[0] in packages or name.startswith("lorafast._report.plots"):
                monkeypatch.delitem(sys.modules, name)
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)

    return hide


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_base(tmp_path / "base")
    for seed in range(3):
        make_adapter(tmp_path / "runs" / str(seed))
    pickled = make_adapter(tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").unlink()
    # What a pickle of torch's is, as far as one is told without torch.
    with zipfile.ZipFile(pickled / "adapter_model.bin", "w") as archive:
        archive.writestr("adapter_model/data.pkl", b"")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "adapters.parquet").touch()
    return tmp_path


#: For each command line the packages that it needs, and the extras that bring them.
COMMANDS = [
    ("similarity runs --output x.png", {"matplotlib", "scipy"}, "fleet"),
    ("similarity runs --output x.svg --device cuda",
     {"matplotlib", "scipy", "torch"}, "torch,fleet"),
    ("similarity runs --device torch:cpu", {"torch"}, "torch"),
    ("similar runs --output x.pdf", {"matplotlib", "scipy"}, "fleet"),
    ("scan runs --output out", {"pyarrow"}, "fleet"),
    ("scan runs --output out --html", {"pyarrow", "plotly"}, "fleet"),
    ("scan runs --html", {"plotly"}, "fleet"),
    ("scan runs --against saved", {"pyarrow"}, "fleet"),
    ("scan runs --against saved/adapters.parquet --html", {"pyarrow", "plotly"}, "fleet"),
    ("merge -b base -a pickled -o out", {"torch"}, "torch"),
    ("merge -b base -a runs/0 -o out --device cuda", {"torch"}, "torch"),
    ("merge -b owner/base -a runs/0 -o out --no-safetensors",
     {"huggingface_hub", "torch"}, "hub,torch"),
    ("merge -b owner/base -a pickled -o out", {"huggingface_hub", "torch"}, "hub,torch"),
    ("merge -b owner/base -a pickled --dry-run", {"huggingface_hub", "torch"}, "hub,torch"),
    ("verify --base base --adapters pickled --merged base", {"torch"}, "torch"),
    ("verify --base base --adapters pickled --merged owner/x",
     {"torch", "huggingface_hub"}, "hub,torch"),
    ("subtract --merged base --adapters pickled owner/x --output out",
     {"torch", "huggingface_hub"}, "hub,torch"),
    ("analyze pickled runs/0", {"torch"}, "torch"),
    ("analyze runs/0 pickled --base owner/base --output out --plots",
     {"torch", "huggingface_hub", "matplotlib"}, "hub,torch,fleet"),
    ("compare runs/0 pickled --output out --plots", {"torch", "matplotlib"}, "torch,fleet"),
    ("inspect pickled", {"torch"}, "torch"),
]  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: case[0])
def test_all_that_is_missing_is_asked_for_before_any_work(
    case: tuple[str, set[str], str],
    folder: Path,
    without: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line, packages, extras = case
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    without(*OPTIONAL)
    # Whoever opens a file of weights goes through the core.
    for name in ("plan_merge", "analyze_adapter", "compare_adapters", "list_adapter"):
        if line != "inspect pickled":
            monkeypatch.setattr(f"lorafast._core.{name}", _never)
    for name in ("scan", "similarity"):
        monkeypatch.setattr(lorafast, name, _never)
    assert main(line.split()) == 1
    error = capsys.readouterr().err
    (message,) = [each for each in error.splitlines() if each.startswith("error: ")]
    assert {name for name in OPTIONAL if f"{name} is needed to" in message} == packages
    (command,) = re.findall(r'pip install "lorafast\[([a-z,]+)\]"', message)
    assert command == extras
    assert sorted(folder.rglob("*")) == before


def _never(*arguments: object, **options: object) -> None:
    raise AssertionError("nothing may be read before the packages are there")


def test_a_picture_needs_its_own_packages_alone(
    folder: Path, without: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    without(*OPTIONAL)
    runs = str(folder / "runs")
    for ending in ("npz", "json", "csv"):
        assert main(["similarity", runs, "--output", str(folder / f"x.{ending}")]) == 0
    assert main(["scan", runs]) == 0
    earlier = folder / "earlier.json"
    lorafast.scan(runs).save(earlier)
    assert main(["scan", runs, "--against", str(earlier)]) == 0
    assert "is needed" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["analyze", "compare"])
def test_plots_that_nobody_asked_for_are_left_out_with_a_warning(
    command: str,
    folder: Path,
    without: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    without("matplotlib")
    adapters = [str(folder / "runs" / name) for name in "01"]
    output = folder / "out"
    assert main([command, *adapters, "--output", str(output)]) == 0
    assert "no plots were drawn" in capsys.readouterr().err
    assert (output / "analysis").is_dir()
    assert not (output / "visualizations").exists()
    assert main([command, *adapters, "--output", str(output), "--no-plots"]) == 0
    assert "no plots" not in capsys.readouterr().err
    assert main([command, *adapters, "--plots"]) == 0


def test_functions_ask_as_the_commands_do(folder: Path, without: Callable[..., None]) -> None:
    without(*OPTIONAL)
    base, pickled = folder / "base", folder / "pickled"
    both = r'huggingface_hub is needed .* and torch is needed .*"lorafast\[hub,torch\]"'
    either = rf'{both}|torch is needed .* and huggingface_hub is needed .*"lorafast\[hub,torch\]"'
    for call in (
        lambda: lorafast.merge("owner/base", pickled, folder / "out"),
        lambda: lorafast.merge("owner/base", folder / "runs/0", folder / "out", device="cuda:1"),
        lambda: lorafast.plan("owner/base", [folder / "runs/0", pickled]),
        lambda: lorafast.verify(base, ["owner/adapter", pickled], folder / "merged"),
        lambda: lorafast.subtract(folder / "base", pickled, folder / "o", original="owner/base"),
        lambda: lorafast.analyze(pickled, base="owner/base"),
        lambda: lorafast.compare([pickled, "owner/adapter"]),
    ):
        with pytest.raises(lorafast.MissingDependencyError, match=either):
            call()
    analyzer = lorafast.LoRAAnalyzer(folder / "runs")
    with pytest.raises(lorafast.MissingDependencyError, match=either):
        analyzer.merge_adapters("owner/base", folder / "runs/0", "name", save_safetensors=False)
    assert not (folder / "out").exists()


def test_what_is_installed_is_not_asked_for() -> None:
    require({"numpy": "compute", "sys": "run"})
    require({})


def test_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def brought(extra: str) -> set[str]:
        found = set()
        for requirement in extras[extra]:
            own = re.fullmatch(r"lorafast\[(.*)\]", requirement)
            if own:
                found |= set().union(*(brought(name) for name in own[1].split(",")))
            else:
                found.add(re.split(r"[<>=]", requirement)[0])
        return found

    always = {re.split(r"[<>=]", requirement)[0] for requirement in project["dependencies"]}
    for extra, packages in EXTRAS.items():
        assert packages - always == brought(extra) - always, extra
    assert "torch" not in brought("all")
    everything = set().union(*EXTRAS.values()) - always - {"torch"}
    assert brought("all") == everything
    # Those that were there before.
    assert {"torch", "hub", "pandas", "polars", "arrow", "charts", "clusters"} <= set(extras)


@pytest.mark.parametrize(
    ("packages", "extras"),
    [
        (["scipy"], ["fleet"]),
        (["pandas"], ["notebook"]),
        (["pandas", "scipy"], ["notebook"]),
        (["pandas", "pyarrow", "plotly"], ["fleet", "notebook"]),
        (["torch", "huggingface_hub"], ["hub", "torch"]),
        (list(OPTIONAL), ["hub", "torch", "fleet", "notebook", "polars"]),
    ],
)
def test_the_fewest_extras_are_named(packages: list[str], extras: list[str]) -> None:
    assert extras_of(packages) == extras
