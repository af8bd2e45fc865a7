"""What goes with a merged model: its card, and reports that name no directories of one machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import pytest
from lorafast._merge.provenance import identify, unique_names, without_paths
from support.files import read_checkpoint
from support.handmade import make_adapter, make_base

CARD = """---
license: llama3
license_link: https://example.org/license
language:
- en
- de
base_model: someone/older
datasets:
  - some/data
---
# The base
"""


def cached(folder: Path, repository: str, revision: str) -> Path:
    """Where the hub's cache has a repository."""
    owner_and_name = repository.replace("/", "--")
    return folder / f"models--{owner_and_name}" / "snapshots" / revision


def front_matter(path: Path) -> dict[str, list[str]]:
    """The lines of a card's front matter by their names."""
    lines = path.read_text().split("---\n")[1].splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        name, _, rest = line.partition(":")
        if line.startswith("- "):
            found[list(found)[-1]].append(json.loads(line[2:]) if '"' in line else line[2:])
        else:
            found[name] = [rest.strip()] if rest.strip() else []
    return found


def test_a_merge_writes_a_card_and_keeps_the_bases(tmp_path: Path) -> None:
    base = make_base(cached(tmp_path, "meta/big-8B", "abc123"))
    (base / "README.md").write_text(CARD)
    adapters = [
        make_adapter(cached(tmp_path, "someone/style", "def456")),
        make_adapter(tmp_path / "home" / "secret-user" / "mine"),
    ]
    out = tmp_path / "out"
    report = lorafast.merge(base, adapters, out, weights=[0.5, 0.25])
    assert (out / "README.base.md").read_text() == CARD
    assert front_matter(out / "README.md") == {
        "base_model": ["meta/big-8B", "someone/style"],
        "base_model_relation": ["merge"],
        "license": ["llama3"],
        "license_link": ["https://example.org/license"],
        "language": ["en", "de"],
        "library_name": ["transformers"],
        "tags": ["merge", "lora", "lorafast"],
    }
    text = (out / "README.md").read_text()
    assert "| `someone/style` | `def456` | 0.5 | 4 |" in text
    assert "| `mine` |  | 0.25 | 4 |" in text
    assert report.file_origins["README.md"] == "merge"
    assert report.file_origins["README.base.md"] == "base"


def test_the_card_says_with_what_a_strategy_was_run(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapters = [make_adapter(tmp_path / f"a{number}") for number in range(2)]

    def pages(name: str, **asked: Any) -> list[str]:
        lorafast.merge(base, adapters, tmp_path / name, **asked)
        return [(tmp_path / name / file).read_text() for file in ("README.md", "merge_report.md")]

    options = {"density": 0.5, "epsilon": 0.1, "normalize": False}
    for text in pages("della", strategy="della", strategy_options=options, seed=7):
        assert "| Strategy | della |\n" in text
        assert "| Strategy's options | density=0.5, epsilon=0.1, normalize=false |\n" in text
        assert "| Seed | 7 |\n" in text
    # What draws nothing at random has no seed.
    for text in pages("slerp", strategy="slerp", strategy_options={"t": 0.25}, seed=7):
        assert "| Strategy | slerp |\n| Strategy's options | t=0.25 |\n" in text
        assert "Seed" not in text
    for text in pages("plain"):
        assert "options" not in text
        assert "Seed" not in text


def test_a_merge_into_a_merge_keeps_the_nearer_card(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    (base / "README.md").write_text("first")
    lorafast.merge(base, adapter, tmp_path / "one")
    lorafast.merge(tmp_path / "one", adapter, tmp_path / "two")
    kept = (tmp_path / "two" / "README.base.md").read_text()
    assert kept == (tmp_path / "one" / "README.md").read_text()
    lorafast.subtract(tmp_path / "two", adapter, tmp_path / "back")
    assert (tmp_path / "back" / "README.md").read_text() == kept
    assert not (tmp_path / "back" / "README.base.md").exists()


def test_without_a_report_the_card_is_the_bases(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    (base / "README.md").write_text(CARD)
    lorafast.merge(base, adapter, tmp_path / "out", report=False)
    assert (tmp_path / "out" / "README.md").read_text() == CARD
    assert not (tmp_path / "out" / "README.base.md").exists()


@pytest.mark.parametrize(
    ("told", "expected"),
    [("meta/big-8B", ["meta/big-8B"]), ("/data/models/big", None), ("base", None)],
)
def test_the_base_of_a_plain_directory_is_what_the_adapter_was_trained_on(
    tmp_path: Path, told: str, expected: list[str] | None
) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base_model_name_or_path=told)
    lorafast.merge(base, adapter, tmp_path / "out")
    found = front_matter(tmp_path / "out" / "README.md")
    assert found.get("base_model") == expected
    assert ("base_model_relation" in found) is (expected is not None)


@pytest.mark.parametrize(
    "card", ["", "# no front matter", "---\nlicense: mit\n", "---\n: :\n---\n"]
)
def test_odd_cards_of_bases(tmp_path: Path, card: str) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    (base / "README.md").write_text(card)
    lorafast.merge(base, adapter, tmp_path / "out")
    assert "license" not in front_matter(tmp_path / "out" / "README.md")
    assert (tmp_path / "out" / "README.base.md").read_text() == card


def test_reports_beside_a_model_name_no_directories(tmp_path: Path) -> None:
    folder = tmp_path / "home" / "secret-user"
    base = make_base(cached(folder, "meta/big-8B", "abc123"))
    adapters = [make_adapter(folder / "one" / "mine"), make_adapter(folder / "two" / "mine")]
    for adapter in adapters:
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 0}))
    out = folder / "out"
    report = lorafast.merge(base, adapters, out, verify=True)
    assert any("scale is 0" in warning for warning in report.warnings)
    for path in [out / "merge_report.json", out / "merge_report.md", out / "README.md"]:
        assert "secret-user" not in path.read_text()
    assert "secret-user" not in report.to_markdown()
    written = json.loads((out / "merge_report.json").read_text())
    assert written["base"] == "meta/big-8B"
    assert written["adapters"] == ["mine", "mine (2)"]
    assert list(written["adapter_sha256"]) == ["mine", "mine (2)"]
    assert written["output_path"] == "out"
    names = dict(zip(written["adapters"], report.adapter_sha256.values(), strict=True))
    assert written["sources"] == [
        {
            "role": "base",
            "name": "meta/big-8B",
            "revision": "abc123",
            "header_sha256": report.base_header_sha256,
        },
        {"role": "adapter 0", "name": "mine", "revision": None, "sha256": names["mine"]},
        {"role": "adapter 1", "name": "mine (2)", "revision": None, "sha256": names["mine (2)"]},
    ]
    assert any(warning.startswith("mine (2): ") for warning in written["warnings"])
    # What the caller gets is about this machine, and says where things are.
    assert report.base == str(base)
    assert report.output_path == str(out)


def test_reports_of_subtractions_name_no_directories(tmp_path: Path) -> None:
    folder = tmp_path / "secret-user"
    base, adapter = make_base(folder / "base"), make_adapter(folder / "adapter")
    lorafast.merge(base, adapter, folder / "merged", report=False)
    for name, original in (("back", None), ("exact", base)):
        lorafast.subtract(folder / "merged", adapter, folder / name, original=original)
        for ending in ("json", "md"):
            text = (folder / name / f"subtract_report.{ending}").read_text()
            assert "secret-user" not in text
        assert not (folder / name / "README.md").exists()
    assert read_checkpoint(folder / "exact") == read_checkpoint(base)


def test_names_of_paths() -> None:
    hub = identify("/c/models--meta--big-8B/snapshots/abc123")
    assert hub == ("meta/big-8B", "abc123", "meta/big-8B")
    below = identify("/c/models--meta--big/snapshots/abc/checkpoint-7")
    assert below == ("meta/big/checkpoint-7", "abc", "meta/big")
    assert identify("/c/models--gpt2/snapshots/abc").name == "gpt2"
    assert identify("/a/b/").name == "b"
    assert identify(".").name == Path.cwd().name
    names = unique_names(["/a/x", "/b/x", "/c/y", "/a/x"])
    assert names == {"/a/x": "x", "/b/x": "x (2)", "/c/y": "y"}
    texts = ["/a/x: odd", "in /a/x/file", "/a/xy", "pre/a/x", {"/b/x": ("/c/y", 1)}]
    assert without_paths(texts, names) == [
        "x: odd",
        "in x/file",
        "/a/xy",
        "pre/a/x",
        {"x (2)": ["y", 1]},
    ]
