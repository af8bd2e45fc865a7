"""The layers of the package and of the Rust core: what may import what."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import lorafast
import pytest

ROOT = Path(str(lorafast.__file__)).parent

#: The layers of the Python package, from the bottom up, each by the beginnings of its modules'
#: names. A module imports what lies below it, or beside it in its own layer; the longest beginning
#: tells where a module lies. A result finds its views, which lie above it, in a table (`_results`).
PYTHON = [
    ("_core", "_errors", "_deprecation"),
    ("_types", "_weights", "_words", "_seeds"),
    ("_io",),
    ("_options", "_results"),
    # What computes with torch and knows a merge's plan only as the core's.
    ("_torch",),
    ("_merge",),
    # Merging into loaded modules, which is planned like any other merge.
    ("_torch.module_plan", "_torch.in_place", "_torch.live_merge"),
    ("_convert",),
    ("_algebra",),
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


#: The Rust core's sources, where the tests run in the repository.
CORE = Path(__file__).parent.parent / "rust" / "src"
#: What a Rust file consists of, as far as these rules go: comments, string literals, the rest.
RUST_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)
      | b?r(?P<hashes>\#*)"(?P<raw>.*?)"(?P=hashes)
      | b?"(?P<string>(?:\\.|[^"\\])*)"
      | b?'(?:\\.[^']*|[^'\\])'
      | \w+ | [^\w/"']+ | .""",
    re.DOTALL | re.VERBOSE,
)
#: Names of PEFT's files, keys and settings. Sentences to users may have them; a literal without a
#: space is such a name.
PEFT_NAME = re.compile(
    r"\blora_[AB]\b|\blora_(embedding|magnitude_vector|diag)|^base_model\b"
    r"|^adapter_(config|model)\b|^peft_|^(lora_alpha|lora_bias|use_dora|use_rslora|rank_pattern"
    r"|alpha_pattern|target_modules|target_parameters|modules_to_save|fan_in_fan_out"
    r"|init_lora_weights|layer_replication|trainable_token_indices)$"
)
#: A directory may hold an adapter beside a base, or instead of one. Its files' names tell that
#: before any format is asked. A column of a fleet's tables is called `peft_type`.
PEFT_NAMES_ELSEWHERE = {
    "storage/file_names.rs": {
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_model.bin",
    },
    "measure/fleet/tables.rs": {"peft_type"},
    "adapter/grammar/components.rs": {"base_model.model."},
}
#: What touches files. Metadata that was read already can be asked.
FILE_ACCESS = re.compile(
    r"\bstd::fs\b|\bstd::\{[^}]*\bfs\b|\bfs::|\brustix::fs\b|\bFile::(?:open|create|create_new|options|metadata)\b"
    r"|\bOpenOptions\b|(?<!metadata)\.(?:is_dir|is_file|is_symlink)\(\)"
    r"|\.(?:exists|try_exists|metadata|symlink_metadata|read_dir|read_link|canonicalize)\(\)"
)


@dataclass
class RustModule:
    """A file of the core without comments and tests, and its string literals."""

    #: Its path within the crate: ("plan", "update").
    path: tuple[str, ...]
    file: str
    code: str = ""
    literals: list[str] = field(default_factory=list)
    #: Modules that it declares for tests alone.
    test_modules: set[str] = field(default_factory=set)

    def references(self) -> Iterator[tuple[str, ...]]:
        """What it names within the crate, as paths from the crate's root."""
        for use in re.finditer(r"\b(crate|self|super)((?:\s*::\s*super)*)\s*::\s*", self.code):
            root, ups = use[1], use[2].count("super") + (use[1] == "super")
            if root == "crate":
                above: tuple[str, ...] = ()
            else:
                above = self.path[: len(self.path) - ups]
            for names in use_tree(self.code[use.end() :]):
                yield above + names


def use_tree(text: str) -> Iterator[tuple[str, ...]]:
    """The paths that a text begins with: `a::b`, `a::{b, c::d}`."""
    match = re.match(r"\s*(\w+)(\s*::\s*)?", text)
    if match and not match[2]:
        yield (match[1],)
    elif match:
        for rest in use_tree(text[match.end() :]):
            yield (match[1], *rest)
    elif text.lstrip().startswith("{"):
        for part in split_group(text[text.index("{") + 1 :]):
            yield from use_tree(part)
    else:
        yield ()


def split_group(text: str) -> Iterator[str]:
    """The parts between commas until the brace that closes the group."""
    depth, start = 0, 0
    for position, character in enumerate(text):
        if character == "{":
            depth += 1
        elif character == "}" and depth == 0:
            yield text[start:position]
            return
        elif character == "}":
            depth -= 1
        elif character == "," and depth == 0:
            yield text[start:position]
            start = position + 1
    raise AssertionError("a brace that nothing closes")


def parse_rust(path: tuple[str, ...], file: Path) -> RustModule:
    """Reads one file."""
    module = RustModule(path, file.relative_to(CORE).as_posix())
    tokens = []
    for token in RUST_TOKEN.finditer(file.read_text(encoding="utf-8")):
        text = token["raw"] if token["string"] is None else token["string"]
        if text is not None:
            # A number in the code stands for the literal.
            tokens.append(f'"{len(module.literals)}"')
            module.literals.append(text)
        elif token["comment"] is None:
            tokens.append("''" if token[0].startswith(("'", "b'")) else token[0])
    code = "".join(tokens)
    while test := re.search(r"#\[cfg\((?:all\()?test\b[^\]]*\]", code):
        end = test.end() + re.search(r"[{;]", code[test.end() :]).start()  # type: ignore[union-attr]  # a test has a body or an end
        if code[end] == ";":
            if declared := re.search(r"\bmod\s+(\w+)\s*$", code[test.end() : end]):
                module.test_modules.add(declared[1])
        else:
            for part in split_group(code[end + 1 :]):
                end += len(part) + 1
        code = code[: test.start()] + code[end + 1 :]
    used = {int(number) for number in re.findall(r'"(\d+)"', code)}
    module.literals = [text for number, text in enumerate(module.literals) if number in used]
    module.code = code
    return module


@pytest.fixture(scope="module")
def core() -> dict[tuple[str, ...], RustModule]:
    """The core's modules by their paths, without those for tests."""
    modules = {}
    for file in sorted(CORE.rglob("*.rs")):
        parts = file.relative_to(CORE).with_suffix("").parts
        path = () if parts == ("lib",) else parts
        modules[path] = parse_rust(path, file)
    for_tests = {
        (*module.path, name) for module in modules.values() for name in module.test_modules
    }
    return {
        path: module
        for path, module in modules.items()
        if not any(path[:length] in for_tests for length in range(1, len(path) + 1))
    }


def core_layers() -> list[str]:
    """The core's layers from the bottom up, as the crate's documentation lists them."""
    text = (CORE / "lib.rs").read_text(encoding="utf-8")
    head = text[: text.index("\n\n")].partition("Folders are layers")[2]
    entries = head.partition("\n//! - ")[2]
    return re.findall(r"`([a-z_]+)`", entries)


def test_the_core_lists_all_its_layers(core: dict[tuple[str, ...], RustModule]) -> None:
    layers = core_layers()
    assert sorted(layers) == sorted({path[0] for path in core if path})


def test_every_use_in_the_core_runs_down(core: dict[tuple[str, ...], RustModule]) -> None:
    layers = core_layers()
    upward = sorted(
        {
            f"{module.file} uses {'::'.join(names)}"
            for module in core.values()
            for names in module.references()
            if module.path and names and names[0] in layers
            if layers.index(names[0]) > layers.index(module.path[0])
        }
    )
    assert upward == []


def test_no_uses_in_the_core_run_in_a_circle_of_folders(
    core: dict[tuple[str, ...], RustModule],
) -> None:
    """A folder and those within it are one subject, and may use one another."""
    folders = {path[:length] for path in core for length in range(1, len(path))}

    def folder_of(path: tuple[str, ...]) -> tuple[str, ...]:
        while path and path not in core:
            path = path[:-1]
        return path if path in folders else path[:-1]

    arrows: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for module in core.values():
        start = folder_of(module.path)
        for names in module.references():
            end = folder_of(names)
            if start[: len(end)] != end and end[: len(start)] != start:
                arrows.setdefault(start, set()).add(end)
    assert len(arrows) > 5
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail("a circle of folders: " + " ← ".join("/".join(each) for each in error.args[1]))


def test_only_the_storage_touches_files(core: dict[tuple[str, ...], RustModule]) -> None:
    touching = [
        f"{module.file}: {access[0]}"
        for module in core.values()
        if module.path[:1] != ("storage",)
        for access in FILE_ACCESS.finditer(module.code)
    ]
    assert touching == []
    storage = [module for module in core.values() if module.path[:1] == ("storage",)]
    assert any(FILE_ACCESS.search(module.code) for module in storage)


def dependencies(folder: Path) -> dict[str, Any]:
    """The crates that a crate takes, tests apart."""
    manifest = tomllib.loads((folder / "Cargo.toml").read_text(encoding="utf-8"))
    found: dict[str, Any] = manifest["dependencies"]
    return found


def test_the_core_and_the_stores_know_each_other_by_traits_alone() -> None:
    """What is asynchronous lies in a crate of its own, which the binding may do without."""
    root = CORE.parent.parent
    core, store = dependencies(root), dependencies(root / "rust" / "store")
    binding = dependencies(root / "rust" / "py")
    asynchronous = {"tokio", "object_store", "reqwest", "futures-util", "async-trait"}
    assert not asynchronous & {*core, *binding}
    assert asynchronous <= {*store}
    assert "pyo3" not in {*core, *store}
    assert binding["lorafast-store"]["optional"] is True


def test_only_the_formats_know_the_names_of_peft(core: dict[tuple[str, ...], RustModule]) -> None:
    found: dict[str, set[str]] = {}
    for module in core.values():
        names = {text for text in module.literals if not re.search(r"\s", text)}
        names = {text for text in names if PEFT_NAME.search(text)}
        if names and module.path[:2] != ("adapter", "formats"):
            found[module.file] = names
    assert found == PEFT_NAMES_ELSEWHERE
    peft = [module for module in core.values() if "peft" in module.path]
    assert any(PEFT_NAME.search(text) for module in peft for text in module.literals)


def test_the_plan_asks_for_no_settings_of_an_adapter(
    core: dict[tuple[str, ...], RustModule],
) -> None:
    """What they mean stands in an adapter's semantics. A base has a config of its own."""
    asked = [
        f"{module.file}: {call[0]}"
        for module in core.values()
        if module.path[:1] == ("plan",)
        for call in re.finditer(r"(\w+)(?:\(\)|\[\w+\])?\s*\.(?:config|settings)\(\)", module.code)
        if call[1] != "base" or call[0].endswith("settings()")
    ]
    assert asked == []
