"""What `import lorafast` costs and offers."""

from __future__ import annotations

import inspect
import json
import pickle
import subprocess
import sys
from importlib import resources

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


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import json, sys, lorafast; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True
    ).stdout
    loaded = {name.split(".")[0] for name in json.loads(output)}
    assert "lorafast" in loaded
    assert not loaded.intersection(HEAVY)


def test_all_is_exact() -> None:
    assert len(lorafast.__all__) == len(set(lorafast.__all__))
    assert set(lorafast.__all__) >= PUBLIC
    offered = {
        name
        for name, value in vars(lorafast).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    # Names that are loaded on first use stand in __all__ alone.
    assert offered <= set(lorafast.__all__)
    for name in lorafast.__all__:
        assert hasattr(lorafast, name), name
    assert set(lorafast.__all__) <= set(dir(lorafast))


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
    from pathlib import Path

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


def test_types_are_shipped() -> None:
    assert resources.files("lorafast").joinpath("py.typed").is_file()


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert lorafast.__version__ == version("lorafast")


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
        "strategy": "sequential",
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
