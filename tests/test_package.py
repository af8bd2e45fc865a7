"""What `import lorafast` costs and offers."""

from __future__ import annotations

import ast
import inspect
import json
import pickle
import subprocess
import sys
from importlib import resources
from pathlib import Path

import lorafast
import pytest

HEAVY = [
    "accelerate",
    "huggingface_hub",
    "matplotlib",
    "pandas",
    "peft",
    "polars",
    "rich",
    "rich_argparse",
    "scipy",
    "torch",
    "transformers",
]

PUBLIC = {
    "AdapterError",
    "CheckpointError",
    "LorafastError",
    "MergePlan",
    "MergeReport",
    "MissingDependencyError",
    "NumericError",
    "OutputError",
    "PlanError",
    "UnsupportedAdapterError",
    "__version__",
    "inspect",
    "merge",
    "plan",
}

ERRORS = [
    "LorafastError",
    "CheckpointError",
    "AdapterError",
    "UnsupportedAdapterError",
    "PlanError",
    "OutputError",
    "NumericError",
    "MissingDependencyError",
]


#: NeuroTrain's names, which can be imported and are offered to nobody.
COMPATIBILITY = {
    "LoRAAnalyzer",
    "UnifiedAnalyzer",
    "analyze_lora_weights",
    "compare_lora_adapters",
    "merge_lora_adapters",
}

#: Too slow for a command that only has to answer or to merge.
SLOW = {"argparse", "asyncio", "dataclasses", "numpy", "sqlite3", "statistics", "typing", "urllib"}


def loaded_after(code: str) -> set[str]:
    """The modules that a fresh interpreter holds after some code, beyond those it starts with."""
    count = "import json, sys; before = set(sys.modules)"
    tell = "print(chr(10) + json.dumps(sorted(set(sys.modules) - before)))"
    output = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{count}\n{code}\n{tell}"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return set(json.loads(output.splitlines()[-1]))


def packages(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


@pytest.mark.parametrize(
    "code",
    [
        "import lorafast",
        "from lorafast._cli.main import main; main(['--version'])",
    ],
)
def test_importing_it_imports_nothing_heavy(code: str) -> None:
    loaded = loaded_after(code)
    assert "lorafast" in loaded
    assert not packages(loaded).intersection([*HEAVY, *SLOW])
    ours = {name for name in loaded if name.startswith("lorafast.")}
    assert ours <= {"lorafast._core", "lorafast._errors", "lorafast._cli", "lorafast._cli.main"}


def test_a_name_imports_its_own_module_alone() -> None:
    loaded = loaded_after("from lorafast import merge")
    assert "lorafast._merge.api" in loaded
    assert not loaded.intersection({"lorafast._analysis.api", "lorafast.analyzers"})
    assert not packages(loaded).intersection([*HEAVY, "numpy"])


def test_a_merge_by_the_command_imports_nothing_heavy(tmp_path: Path) -> None:
    from support.handmade import adapter_tensors, make_adapter, make_base

    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors())
    words = ["merge", "--base", str(base), "--adapters", str(adapter)]
    words += ["--output", str(tmp_path / "out")]
    loaded = loaded_after(f"from lorafast._cli.main import main; assert main({words!r}) == 0")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not packages(loaded).intersection([*HEAVY, "numpy"])
    commands = {name for name in loaded if name.startswith("lorafast._cli.")}
    assert "lorafast._cli.merge" in commands
    assert not commands.intersection({"lorafast._cli.analyze", "lorafast._cli.scan"})


def test_the_errors_have_a_module_of_their_own() -> None:
    public = {
        name
        for name in lorafast.__all__
        if isinstance(getattr(lorafast, name), type)
        and issubclass(getattr(lorafast, name), lorafast.LorafastError)
    }
    assert set(lorafast.errors.__all__) == public
    for name in public:
        assert getattr(lorafast.errors, name) is getattr(lorafast, name)


def test_type_checkers_and_the_interpreter_find_the_same_names() -> None:
    tree = ast.parse(Path(str(lorafast.__file__)).read_text())
    seen = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lorafast.")
        for alias in node.names
    }
    at_once = {"lorafast._core", "lorafast._errors"}
    lazily = {
        (f"lorafast.{home}", name) for home, names in lorafast._HOMES.items() for name in names
    }
    assert {(home, name) for home, name in seen if home not in at_once} == lazily
    assert {name for _, name in seen} == set(lorafast.__all__) | COMPATIBILITY


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'merges'"):
        _ = lorafast.merges  # type: ignore[attr-defined]  # wrong on purpose
    with pytest.raises(ImportError, match="merges"):
        exec("from lorafast import merges")


def test_all_is_exact() -> None:
    assert len(lorafast.__all__) == len(set(lorafast.__all__))
    assert set(lorafast.__all__) >= PUBLIC
    offered = {
        name
        for name, value in vars(lorafast).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    # Names that are loaded on first use stand in __all__ alone.
    assert offered <= set(lorafast.__all__) | COMPATIBILITY
    for name in lorafast.__all__:
        assert hasattr(lorafast, name), name
    assert set(lorafast.__all__) <= set(dir(lorafast))


@pytest.mark.parametrize("name", sorted(COMPATIBILITY))
def test_neurotrains_names_are_importable_and_offered_to_nobody(name: str) -> None:
    assert name not in lorafast.__all__
    assert getattr(lorafast, name) is getattr(lorafast.analyzers, name)
    assert name in lorafast.analyzers.__all__


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_every_public_name_is_documented_and_at_home(name: str) -> None:
    value = getattr(lorafast, name)
    assert inspect.getdoc(value)
    # Not the builtin base's.
    assert value.__doc__
    assert value.__doc__ not in {Exception.__doc__, object.__doc__}
    # Where a traceback or a pickle says it comes from, it must be found.
    home = sys.modules[value.__module__]
    assert getattr(home, value.__name__) is value


def test_the_hierarchy_of_errors() -> None:
    for name in ERRORS:
        assert issubclass(getattr(lorafast, name), lorafast.LorafastError)
    assert issubclass(lorafast.LorafastError, Exception)
    assert issubclass(lorafast.UnsupportedAdapterError, lorafast.AdapterError)
    # Distinct failures must be told apart by an `except`.
    assert not issubclass(lorafast.CheckpointError, lorafast.AdapterError)
    assert not issubclass(lorafast.PlanError, lorafast.AdapterError)


@pytest.mark.parametrize("name", ERRORS)
def test_errors_survive_pickling(name: str) -> None:
    """Worker processes send their errors back in pickles."""
    error = getattr(lorafast, name)("what is wrong, and where")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.args == error.args


def test_a_raised_plan_error_keeps_its_problems_in_a_pickle(tmp_path: object) -> None:
    import numpy as np
    from support.files import tensor
    from support.handmade import adapter_tensors, make_adapter, make_base

    folder = Path(str(tmp_path))
    strays = {
        f"base_model.model.stray.{n}.lora_{letter}.weight": tensor(np.ones(shape))
        for n in range(12)
        for letter, shape in (("A", (4, 20)), ("B", (24, 4)))
    }
    base = make_base(folder / "base")
    adapter = make_adapter(folder / "adapter", adapter_tensors() | strays)
    with pytest.raises(lorafast.PlanError) as raised:
        lorafast.plan(base, adapter)
    assert len(raised.value.problems) == 12
    again = pickle.loads(pickle.dumps(raised.value))
    assert again.problems == raised.value.problems
    assert str(again) == str(raised.value)


def test_results_are_of_the_public_package(tmp_path: Path) -> None:
    from support.handmade import make_adapter

    adapter = make_adapter(tmp_path / "adapter")
    code = (
        "import sys, lorafast\n"
        "print(type(lorafast.analyze(sys.argv[1])).__module__, end=' ')\n"
        "print(type(lorafast.scan(sys.argv[1])).__module__)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(adapter)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["lorafast", "lorafast"]


def test_types_are_shipped() -> None:
    assert resources.files("lorafast").joinpath("py.typed").is_file()


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert lorafast.__version__ == version("lorafast")


def test_the_build_says_which_instructions_it_has() -> None:
    info = lorafast.build_info()
    assert info["instruction_sets"][0] == "portable"
    assert info["instruction_set"] == info["instruction_sets"][-1]


def test_signatures_are_the_documented_ones() -> None:
    merge = inspect.signature(lorafast.merge).parameters
    # More may follow, as keywords.
    assert list(merge)[:10] == [
        "base",
        "adapters",
        "output",
        "strategy",
        "weights",
        "dtype",
        "device",
        "threads",
        "overwrite",
        "progress",
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(merge.values())[3:])
    defaults = {
        "strategy": None,
        "weights": None,
        "dtype": "auto",
        "device": "cpu",
        "threads": None,
        "overwrite": False,
        "progress": False,
    }
    assert {name: merge[name].default for name in defaults} == defaults
    plan = inspect.signature(lorafast.plan).parameters
    assert list(plan)[:5] == ["base", "adapters", "strategy", "weights", "dtype"]
