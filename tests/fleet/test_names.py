"""Names of a fleet's members: paths below the root, found by either spelling."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import lorafast
import pytest
from lorafast._analysis.names import labels_of
from lorafast._fleet.discovery import discover
from lorafast._fleet.members import ByMember, names_below
from support.analysis import random_factors, write_factors
from support.files import tensor, write_safetensors
from support.handmade import make_adapter

SHAPES = {"layers.0.q": (12, 10, 2), "layers.1.q": (8, 9, 3)}


def names(*sources: object) -> list[str]:
    found = discover([str(source) for source in sources])
    return names_below(found.root, found.adapters)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three runs whose adapters all lie in `final`, and a mixture of two."""
    parts = [random_factors(SHAPES, seed) for seed in range(3)]
    for name, factors in zip(("north", "south", "deep/south"), parts, strict=True):
        write_factors(tmp_path / "runs" / name / "final", factors)
    return tmp_path / "runs"


def test_names_are_paths_below_what_was_scanned(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ["deep/south/final", "north/final", "south/final"]
    monkeypatch.chdir(runs.parent)
    for root in (runs, "runs", "./runs/", "runs/../runs", "runs/**/final"):
        assert sorted(names(root)) == expected, root
    monkeypatch.chdir(runs)
    assert names(".") == expected
    assert names("../runs") == expected
    monkeypatch.chdir(runs / "north")
    assert names("..") == expected
    fleet = lorafast.scan("..")
    assert fleet.names == expected
    assert [(runs / "north" / fleet.root / name).resolve() for name in fleet.names] == [
        path.resolve() for path in fleet.paths
    ]


def test_of_several_sources_the_root_holds_them_all(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert names(runs / "north", runs / "south") == ["north/final", "south/final"]
    # As a shell expands runs/*/final.
    assert names(runs / "north/final", runs / "south/final") == ["north/final", "south/final"]
    assert names(runs / "south/final/adapter_model.safetensors") == ["final"]
    monkeypatch.chdir(runs)
    assert names("north", runs / "deep") == ["north/final", "deep/south/final"]
    assert names("../runs/north", "south") == ["north/final", "south/final"]


def test_the_root_itself_has_its_own_name_and_no_two_have_one(tmp_path: Path) -> None:
    run = make_adapter(tmp_path / "run")
    assert names(run) == ["run"]
    make_adapter(run / "checkpoint-1")
    assert names(run) == ["run", "checkpoint-1"]
    make_adapter(run / "run")
    found = names(run)
    assert found[:2] == ["run", "checkpoint-1"]
    assert len(set(found)) == 3
    factor = {"lora_unet_mid.lora_down.weight": tensor([[1.0]], "F32")}
    write_safetensors(run / "style.safetensors", factor)
    (run / "other").mkdir()
    write_safetensors(run / "other" / "style.safetensors", factor)
    assert names(run)[-2:] == ["other/style.safetensors", "run_2"]


def test_members_by_links_keep_the_name_of_the_link(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for name in ("x1", "x2"):
        make_adapter(store / name)
    links = tmp_path / "links"
    links.mkdir()
    (links / "style").symlink_to(store / "x1", target_is_directory=True)
    (links / "team").symlink_to(store, target_is_directory=True)
    found = lorafast.scan(links, metrics="headers")
    assert found.names == ["style", "team/x2"]
    # Its target finds it as well.
    assert found.position(store / "x1") == 0


def test_either_spelling_finds_a_member(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    fleet = lorafast.scan("runs", metrics="headers")
    spellings = [
        *("north/final", "./north/final/", "runs/north/final", Path("runs/north/final")),
        *(runs / "north/final", str(runs / "north" / "final"), "runs/south/../north/final"),
    ]
    for spelling in spellings:
        assert fleet.position(spelling) == fleet.names.index("north/final"), spelling
        assert fleet[spelling]["name"] == "north/final"
        assert fleet[spelling]["modules"] == 2
        assert spelling in fleet
    assert list(fleet) == fleet.names
    assert "north" not in fleet
    assert 3 not in fleet
    with pytest.raises(KeyError, match="no adapter 'nort/final' is among the 3; did you mean"):
        fleet["nort/final"]

    similarity = lorafast.similarity("runs")
    found = lorafast.duplicates("runs")
    steps = lorafast.trajectory("runs")
    comparison = lorafast.compare(fleet)
    assert comparison.names == fleet.names
    for spelling in spellings:
        assert similarity.names[similarity.position(spelling)] == "north/final"
        assert found.group_of(spelling) is None
        assert steps.step(spelling).name == "north/final"
        assert comparison.names[comparison.position(spelling)] == "north/final"
    with pytest.raises(KeyError):
        found.group_of("nowhere")
    with pytest.raises(KeyError):
        steps.step("nowhere")


def test_duplicates_are_found_by_either_spelling(runs: Path) -> None:
    write_factors(runs / "copy", random_factors(SHAPES, 0))
    found = lorafast.duplicates(runs)
    group = found.group_of("copy")
    assert group is not None
    assert group is found.group_of(runs / "north" / "final")
    assert group.names == ["copy", "north/final"]


def test_a_lineage_takes_names_for_its_target_and_its_values(runs: Path) -> None:
    by_path = lorafast.lineage(runs / "north/final", runs)
    for candidates in (runs, lorafast.scan(runs, metrics="headers")):
        found = lorafast.lineage("north/final", candidates)
        assert found.target == runs / "north/final"
        assert found.name == "north/final"
        assert found.coefficients == by_path.coefficients
        assert list(found.names.values()) == ["deep/south/final", "south/final"]
    assert found.coefficients["south/final"] == found.coefficients[runs / "south" / "final"]  # type: ignore[index]  # by name too, which Mapping[Path, …] does not say
    assert found.cosines["south/final"] == found.cosines[runs / "south/final"]  # type: ignore[index]  # by name too
    copied = pickle.loads(pickle.dumps(found.contributions))
    assert copied == found.contributions
    assert copied["south/final"] == found.contributions[runs / "south/final"]
    with pytest.raises(KeyError, match="no adapter 'east/final'"):
        found.coefficients["east/final"]  # type: ignore[index]  # by name too
    with pytest.raises(FileNotFoundError):
        lorafast.lineage("east/final", runs)


def test_a_targets_name_is_never_a_candidates(tmp_path: Path) -> None:
    write_factors(tmp_path / "new" / "style", random_factors(SHAPES, 1))
    write_factors(tmp_path / "old" / "style", random_factors(SHAPES, 2))
    found = lorafast.lineage(tmp_path / "new" / "style", tmp_path / "old")
    assert list(found.names.values()) == ["style"]
    assert found.name == str(tmp_path / "new" / "style")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["runs/a/final", "runs/b/final"], ["a", "b"]),
        (["runs/a/1/final", "runs/b/final"], ["a/1", "b"]),
        (["a/final", "b/final", "b/old"], ["a/final", "b/final", "b/old"]),
        (["run", "run/1"], ["run", "run/1"]),
        (["x/run/1", "x/run"], ["run/1", "run"]),
        (["a/a", "a/a/a"], ["a", "a/a"]),
        (["runs/a/final"], ["runs/a/final"]),
        (["a", "b"], ["a", "b"]),
        ([], []),
    ],
)
def test_labels_leave_out_what_all_share(given: list[str], expected: list[str]) -> None:
    labels = labels_of(given)
    assert labels == expected
    assert len(set(labels)) == len(set(given))


def test_labels_are_for_pictures_and_formulas_alone(runs: Path) -> None:
    for name in ("south", "north"):
        (runs / name / "final").rename(runs / name / "x")
        (runs / name).rename(runs / f"{name}-1")
    (runs / "deep/south/final").rename(runs / "mix")
    folders = [runs / "north-1", runs / "south-1"]
    similarity = lorafast.similarity(folders)
    assert similarity.names == ["north-1/x", "south-1/x"]
    texts = [text.get_text() for text in similarity.plot().axes[1].get_xticklabels()]
    assert sorted(texts) == ["north-1", "south-1"]
    fleet = lorafast.scan(folders, metrics="headers")
    assert [row["name"] for row in json.loads(fleet.to_json())["adapters"]] == fleet.names
    page = fleet.to_html(similarity=similarity)
    assert '"ticktext": ["north-1", "south-1"]' in page or (
        '"ticktext": ["south-1", "north-1"]' in page
    )
    # Breaks are allowed behind signs; they are no part of the name.
    assert ">north-1/x<" in page.replace("<wbr>", "")


def test_values_by_member_are_a_mapping_of_paths(tmp_path: Path) -> None:
    values = ByMember([(tmp_path / "a" / "x", 1.0), (tmp_path / "b" / "x", 2.0)], ["a/x", "b/x"])
    assert values == {tmp_path / "a" / "x": 1.0, tmp_path / "b" / "x": 2.0}
    assert values["b/x"] == values[str(tmp_path / "b/x")] == 2.0  # type: ignore[index]  # by name too
    assert "b/x" not in list(values)
