"""What a scan leaves out: patterns of names, and of paths below its root."""

from __future__ import annotations

from pathlib import Path

import lorafast
import pytest
from lorafast._fleet.discovery import discover
from lorafast._fleet.exclude import Exclusion
from lorafast._fleet.members import names_below
from support.files import tensor, write_safetensors
from support.handmade import make_adapter

ALL = [
    *("a/checkpoint-5", "a/checkpoint-50", "a/final", "b/old/final", "b/tmp/deep/final"),
    *("final", "kohya/style.safetensors", "old/final"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fleet") / "runs"
    for name in ALL:
        if not name.endswith(".safetensors"):
            make_adapter(root / name)
    (root / "kohya").mkdir()
    factor = {"lora_unet_mid.lora_down.weight": tensor([[1.0]], "F32")}
    write_safetensors(root / "kohya" / "style.safetensors", factor)
    return root


@pytest.mark.parametrize(
    ("pattern", "gone"),
    [
        # A name at any depth.
        ("checkpoint-*", ["a/checkpoint-5", "a/checkpoint-50"]),
        ("checkpoint-?", ["a/checkpoint-5"]),
        ("checkpoint-[0-5]", ["a/checkpoint-5"]),
        ("checkpoint-[!5]*", []),
        ("old", ["b/old/final", "old/final"]),
        ("old/", ["b/old/final", "old/final"]),
        ("*.safetensors", ["kohya/style.safetensors"]),
        ("*.safetensors/", []),
        ("style", []),
        ("inal", []),
        ("final", ["a/final", "b/old/final", "b/tmp/deep/final", "final", "old/final"]),
        # The directory that is searched is none of what lies below it.
        ("runs", []),
        # A path below the root.
        ("/old", ["old/final"]),
        ("./old/final", ["old/final"]),
        ("b/old", ["b/old/final"]),
        ("b/*", ["b/old/final", "b/tmp/deep/final"]),
        ("*/final", ["a/final", "old/final"]),
        ("/final", ["final"]),
        ("**/old/*", ["b/old/final", "old/final"]),
        ("b/**/final", ["b/old/final", "b/tmp/deep/final"]),
        ("b/**", ["b/old/final", "b/tmp/deep/final"]),
        ("**", ALL),
        ("tmp/deep", []),
        ("kohya/style.safetensors", ["kohya/style.safetensors"]),
        # As it was given, and absolute.
        ("runs/old", ["old/final"]),
        ("{root}/old/", ["old/final"]),
        ("{root}/*/final", ["a/final", "old/final"]),
    ],
)
def test_patterns_are_those_that_users_know(
    runs: Path, pattern: str, gone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs.parent)
    try:
        found = discover("runs", [pattern.format(root=runs)])
        kept = names_below(found.root, found.adapters)
    except lorafast.AdapterError:
        kept = []
    assert sorted(set(ALL) - set(kept)) == sorted(gone)
    assert set(kept) <= set(ALL)


def test_several_patterns_and_one_alone(runs: Path) -> None:
    fleet = lorafast.scan(runs, exclude=["checkpoint-*", "b/", "kohya"], metrics="headers")
    assert fleet.names == ["a/final", "final", "old/final"]
    assert fleet.errors == []
    alone = lorafast.scan(runs, exclude="**/[bk]*/**", metrics="headers")
    assert "b/old/final" not in alone.names
    assert "a/final" in alone.names


def test_what_is_named_itself_is_excluded_too(runs: Path) -> None:
    sources = [runs / "a" / name for name in ("checkpoint-5", "final")]
    assert lorafast.scan(sources, exclude=["checkpoint-*"], metrics="headers").names == ["final"]
    globbed = lorafast.scan(f"{runs}/a/*", exclude=["checkpoint-*"], metrics="headers")
    assert globbed.names == ["final"]


def test_what_is_excluded_is_not_looked_at(tmp_path: Path) -> None:
    make_adapter(tmp_path / "good")
    make_adapter(tmp_path / "bad", config="{")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    assert [error.path.name for error in lorafast.scan(tmp_path).errors] == ["bad"]
    assert lorafast.scan(tmp_path, exclude=["bad"]).errors == []


def test_nothing_left_is_an_error_that_says_why(runs: Path) -> None:
    with pytest.raises(lorafast.AdapterError, match="no adapter was found beside what is excluded"):
        lorafast.scan(runs, exclude=["*"])


@pytest.mark.parametrize("pattern", ["", "/"])
def test_an_empty_pattern_is_refused(runs: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match=f"the exclude pattern '{pattern}' is empty"):
        lorafast.scan(runs, exclude=[pattern])


def test_a_set_that_makes_no_sense_is_refused(runs: Path) -> None:
    with pytest.raises(ValueError, match="an exclude pattern cannot be read: bad character range"):
        lorafast.scan(runs, exclude=["[z-a]"])


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.b", "axb", False),
        ("a[.]b", "a.b", True),
        ("a[]b", "a[]b", True),
        ("a[", "a[", True),
        ("[^a]", "^", True),
        ("[!]", "!", True),
        ("[]a]", "]", True),
        ("[\\]", "\\", True),
        ("ü*", "über", True),
        ("a\nb", "a\nb", True),
        ("(a|b)+", "a", False),
    ],
)
def test_all_other_characters_are_themselves(pattern: str, path: str, expected: bool) -> None:
    excluded = Exclusion([pattern], "/somewhere/runs")
    assert excluded(f"/somewhere/runs/{path}", is_directory=True) is expected
