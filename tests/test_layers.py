"""The layers of the package: what may import what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import lorafast
import pytest

ROOT = Path(str(lorafast.__file__)).parent

#: The layers of the Python package, from the bottom up, each by the beginnings of its modules'
#: names. A module imports what lies below it, or beside it in its own layer; the longest beginning
#: tells where a module lies. A result finds its views, which lie above it, in a table (`_results`).
PYTHON = [
    ("_core", "_errors", "_deprecation"),
    ("_types",),
    ("_io",),
    ("_results",),
    # What computes with torch and knows a merge's plan only as the core's.
    ("_torch",),
    ("_merge",),
    # Merging into loaded modules, which is planned like any other merge.
    ("_torch.module_plan", "_torch.in_place", "_torch.live_merge"),
    ("_analysis",),
    ("_fleet",),
    ("_similarity",),
    ("_report",),
    ("analyzers", "errors", "torch"),
    # The public names. In the package itself only type checkers see these imports.
    ("",),
    ("_cli",),
    ("__main__",),
]


def python_modules() -> dict[str, ast.Module]:
    """The package's modules by their names in it, "" for the package itself."""
    modules = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = ast.parse(path.read_text(encoding="utf-8"))
    return modules


def imports_of(tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """What a module imports of the package: at its top, inside functions, and for type checkers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            # `from package import module` imports the module, any other name its own module.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [
                name if name.partition(".")[2] in modules else str(node.module) for name in names
            ]
        else:
            continue
        for name in names:
            package, _, inner = name.partition(".")
            if package == "lorafast":
                yield inner


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    trees = python_modules()
    names = {*trees, "_core"}
    found = {name: set(imports_of(tree, names)) for name, tree in trees.items()}
    assert set().union(*found.values()) <= names
    return found


def layer_of(module: str) -> int:
    """The layer of the longest beginning that a module's name has."""
    parts = module.split(".")
    beginnings = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    for beginning in beginnings:
        for level, layer in enumerate(PYTHON):
            if beginning in layer:
                return level
    raise AssertionError(f"{module} lies in no layer: add it to PYTHON")


def test_every_import_runs_down(arrows: dict[str, set[str]]) -> None:
    upward = [
        f"{module} imports {other}"
        for module, others in arrows.items()
        for other in sorted(others)
        if layer_of(other) > layer_of(module)
    ]
    assert upward == []


def test_no_imports_run_in_a_circle(arrows: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail("a circle of imports: " + " ← ".join(error.args[1]))


def test_packages_hold_nothing_but_what_they_are_about(arrows: dict[str, set[str]]) -> None:
    """An import of one module runs its packages', so that these stay empty."""
    for path in ROOT.rglob("*/__init__.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree) is not None, path
        assert len(tree.body) == 1, path
    assert all(module in arrows for module in ("_merge", "_report.html"))
