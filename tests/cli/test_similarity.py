"""`lorafast similarity`, `duplicates` and `lineage`: streams, files, exit codes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import lorafast
import numpy as np
import pytest
from lorafast._cli.main import main
from support.analysis import random_factors, write_factors

Capture = pytest.CaptureFixture[str]
SHAPES = {"layers.0.q": (40, 30, 4), "layers.1.q": (26, 50, 3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two adapters, a copy of the first, their mixture, and one that is broken."""
    one, two = random_factors(SHAPES, 1), random_factors(SHAPES, 2)
    path = write_factors(tmp_path / "fleet" / "one", one, dtype="F32")
    write_factors(tmp_path / "fleet" / "two", two, dtype="F32")
    shutil.copytree(path, tmp_path / "fleet" / "one-again")
    mix = {
        p: (np.concatenate([0.7 * one[p][0], 0.3 * two[p][0]], 1),
            np.concatenate([one[p][1], two[p][1]], 0))
        for p in SHAPES
    }  # fmt: skip
    write_factors(tmp_path / "fleet" / "mix", mix, dtype="F32")
    broken = write_factors(tmp_path / "fleet" / "broken", two)
    (broken / "adapter_model.safetensors").write_bytes(b"no")
    return tmp_path / "fleet"


def test_the_most_alike_pairs(folder: Path, capsys: Capture) -> None:
    assert main(["similarity", str(folder)]) == 0
    printed, errors = capsys.readouterr()
    lines = printed.splitlines()
    assert lines[0] == "Similarity of 4 adapters"
    first = next(line for line in lines if "1.0000" in line)
    assert first.split() == ["1.0000", "one", "one-again"]
    (warning,) = errors.splitlines()
    assert warning.startswith(f"warning: left out {folder / 'broken'}: ")
    assert "adapter_model.safetensors: is a text, no weights" in warning
    assert warning.count(str(folder)) == 1


def test_the_nearest_of_each(folder: Path, capsys: Capture) -> None:
    assert main(["similarity", str(folder), "--nearest", "2"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    place = next(i for i, row in enumerate(rows) if row[:1] == ["one"])
    assert rows[place] == ["one", "1.0000", "one-again"]
    assert rows[place + 1][1:] == ["mix"]


def test_the_nearest_of_one_by_name_or_path(folder: Path, capsys: Capture) -> None:
    for spelling in ("one", str(folder / "one"), f"{folder}/./one/"):
        assert main(["similarity", str(folder), "--of", spelling, "--nearest", "1"]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert rows[-1] == ["one", "1.0000", "one-again"]
    assert main(["similarity", str(folder), "--of", "one", "--of", "mix", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["nearest"]
    assert list(found) == ["one", "mix"]
    assert len(found["mix"]) == 3
    assert main(["similarity", str(folder), "--of", "onne"]) == 1
    assert "no adapter 'onne' is among the 4; did you mean 'one'?" in capsys.readouterr().err


def test_a_target_may_be_named_as_a_candidate_is(folder: Path, capsys: Capture) -> None:
    assert main(["lineage", "mix", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("mix ≈ 0.70·one + 0.30·two")


def test_similar_as_json(folder: Path, capsys: Capture) -> None:
    assert main(["similarity", str(folder), "--json", "--nearest", "1"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["names"] == ["mix", "one", "one-again", "two"]
    assert plain["nearest"]["one"] == [{"name": "one-again", "cosine": 1.0}]
    assert plain["errors"][0]["path"] == str(folder / "broken")


@pytest.mark.parametrize("ending", ["npz", "csv", "json", "png", "svg"])
def test_the_matrix_is_written(folder: Path, tmp_path: Path, ending: str, capsys: Capture) -> None:
    output = tmp_path / f"similar.{ending}"
    assert main(["similarity", str(folder), "--output", str(output)]) == 0
    assert f"Written to {output}" in capsys.readouterr().out
    expected = lorafast.similarity(folder).matrix
    if ending == "npz":
        assert np.array_equal(lorafast.Similarity.load(output).matrix, expected)
    elif ending == "json":
        assert json.loads(output.read_text())["matrix"] == expected.tolist()
    elif ending == "csv":
        rows = list(csv.reader(output.read_text(encoding="utf-8").splitlines()))
        assert rows[0] == ["", "mix", "one", "one-again", "two"]
        assert [[float(cell) for cell in row[1:]] for row in rows[1:]] == expected.tolist()
    else:
        assert output.stat().st_size > 5000


def test_bases(tmp_path: Path, capsys: Capture) -> None:
    for name in ("a", "b"):
        factors = random_factors(SHAPES, 1)
        write_factors(tmp_path / name, factors, base_model_name_or_path=f"hub/{name}")
    assert main(["similarity", str(tmp_path)]) == 1
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert errors.startswith("error: the adapters belong to 2 bases: hub/a (1: a); hub/b (1: b)")
    assert len(errors.splitlines()) == 1
    assert main(["similarity", str(tmp_path), "--group-by-base"]) == 0
    assert "base hub/b" in capsys.readouterr().out
    assert main(["similarity", str(tmp_path), "--ignore-base"]) == 0
    assert "1.0000" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["similarity", "duplicates"])
def test_nothing_there(tmp_path: Path, command: str, capsys: Capture) -> None:
    assert main([command, str(tmp_path)]) == 1
    assert "no adapter was found" in capsys.readouterr().err
    assert main([command, str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.startswith("error: No such file or directory")


@pytest.mark.parametrize(
    "flags",
    [
        ["similarity", "x", "--nearest", "0"],
        ["similarity", "x", "--output", "matrix.xls"],
        ["similarity", "x", "--memory", "0"],
        ["similarity", "x", "--precision", "float16"],
        ["lineage", "x"],
    ],
)
def test_wrong_flags(flags: list[str], capsys: Capture) -> None:
    assert main(flags) == 2
    assert "error: " in capsys.readouterr().err


def test_duplicates_with_their_evidence(folder: Path, capsys: Capture) -> None:
    assert main(["duplicates", str(folder)]) == 0
    printed, errors = capsys.readouterr()
    assert "The same weights file, with the same scales" in printed
    assert "SHA-256" in printed
    assert printed.splitlines()[-1] == "1 group; 1 adapter could go"
    assert "left out" in errors
    assert main(["duplicates", str(folder), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    (group,) = plain["groups"]
    assert group["tier"] == "same_bytes"
    assert group["names"] == ["one", "one-again"]
    assert main(["duplicates", str(folder / "one"), str(folder / "two")]) == 0
    assert "No two of them are the same update." in capsys.readouterr().out


def test_a_mixture_in_words(folder: Path, capsys: Capture) -> None:
    arguments = ["lineage", *(str(folder / name) for name in ("mix", "one", "one-again", "two"))]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("mix ≈ 0.70·one + 0.30·two, residual ")
    assert "left out: is the update of one" in printed
    assert main([*arguments, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    weights = {item["name"]: item["coefficient"] for item in plain["candidates"]}
    assert weights == pytest.approx({"one": 0.7, "one-again": 0.0, "two": 0.3}, abs=1e-6)


def test_checkpoints_in_order(tmp_path: Path, capsys: Capture) -> None:
    factors = random_factors(SHAPES, 1)
    for step in (100, 20, 3):
        own = {p: (step * b, a) for p, (b, a) in factors.items()}
        write_factors(tmp_path / f"checkpoint-{step}", own)
    assert main(["trajectory", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 checkpoints in order"
    names = [line.split()[0] for line in lines if "checkpoint-" in line]
    assert names == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert main(["trajectory", "--by", "name", "--json", str(tmp_path)]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["agrees"]


def test_quiet_and_threads(folder: Path, capsys: Capture) -> None:
    assert main(["similarity", str(folder / "one"), str(folder / "two"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["duplicates", str(folder), "--threads", "0"]) == 1
    assert "threads is 0; it is 1 to 1024" in capsys.readouterr().err


def test_what_is_made_of_nothing_else_has_no_formula(tmp_path: Path, capsys: Capture) -> None:
    for seed, name in enumerate(("one", "two", "three")):
        write_factors(tmp_path / name, random_factors({"q": (300, 200, 2)}, seed))
    assert main(["lineage", str(tmp_path / "one"), str(tmp_path)]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "one: nothing of these, residual 100 %"


def test_ignored_bases_are_all_named(tmp_path: Path, capsys: Capture) -> None:
    for seed, base in enumerate(("hub/llama", "hub/qwen", "hub/llama", None)):
        factors = random_factors(SHAPES, seed)
        write_factors(tmp_path / f"a{seed}", factors, base_model_name_or_path=base)
    found = lorafast.similarity(tmp_path, ignore_base=True)
    assert found.groups == {"hub/llama, hub/qwen, no base named": [0, 1, 2, 3]}
    (note,) = found.notes
    assert note == (
        "4 adapters of 3 bases are compared as of one: hub/llama (2), hub/qwen (1), "
        "no base named (1)"
    )
    found.save(tmp_path / "saved.npz")
    assert lorafast.Similarity.load(tmp_path / "saved.npz").notes == [note]
    assert main(["similarity", str(tmp_path), "--ignore-base"]) == 0
    printed = capsys.readouterr().out
    assert "base hub/llama, hub/qwen, no base named  4 adapters" in printed
    assert note in printed
    one = lorafast.similarity([tmp_path / "a0", tmp_path / "a2"], ignore_base=True)
    assert list(one.groups) == ["hub/llama"]
    assert one.notes == []
