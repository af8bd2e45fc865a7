"""A merge without a base takes the one that the adapters' own configs name, and says so."""

from __future__ import annotations

import re
from pathlib import Path

import lorafast
import pytest
from lorafast._cli.main import main
from support.handmade import adapter_tensors, make_adapter, make_base
from support.hub import Hub, running_hub


def adapter(path: Path, base: str | None, *, seed: int = 1, revision: str | None = None) -> Path:
    settings = {"base_model_name_or_path": base, "revision": revision}
    return make_adapter(path, adapter_tensors(seed=seed), **settings)


def weights(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def test_the_base_that_a_config_names_is_taken_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "models" / "base")
    absolute = adapter(tmp_path / "absolute", str(base))
    relative = adapter(tmp_path / "relative", "models/base", seed=2)
    lorafast.merge(base, [absolute, relative], tmp_path / "expected")
    capsys.readouterr()
    # As PEFT takes it: from the current directory.
    monkeypatch.chdir(tmp_path)
    report = lorafast.merge(None, [absolute, relative], tmp_path / "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")
    note = f"no base was given: {base}, which adapter_config.json of all 2 adapters names"
    assert report.notes[0] == note
    assert capsys.readouterr() == ("", f"note: {note}\n")
    said = (tmp_path / "out" / "merge_report.json").read_text()
    assert "no base was given: base, which adapter_config.json of all 2 adapters names" in said
    plan = lorafast.plan(None, relative)
    assert plan.base == "models/base"
    assert plan.to_dict()["notes"] == plan.notes
    assert plan.notes[0].startswith("no base was given: models/base, which adapter_config.json of")
    weighed = lorafast.verify(None, [absolute, relative], tmp_path / "out")
    assert weighed.ok


def test_the_command_needs_no_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base")
    style = str(adapter(tmp_path / "style", str(base)))
    out = str(tmp_path / "out")
    assert main(["merge", "--adapters", style, "--output", out, "--json", "--quiet"]) == 0
    streams = capsys.readouterr()
    assert streams.out.startswith("{")
    assert f"note: no base was given: {base}, which adapter_config.json of {style}" in streams.err
    assert main(["merge", "--adapters", style, "--dry-run"]) == 0
    assert "no base was given" in capsys.readouterr().err
    assert main(["verify", "--adapters", style, "--merged", out]) == 0
    assert "no base was given" in capsys.readouterr().err
    # Nothing ever asks.
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    none = str(adapter(tmp_path / "none", None))
    assert main(["merge", "--adapters", none, "--output", f"{out}-2"]) == 1
    assert "base_model_name_or_path" in capsys.readouterr().err


def test_a_part_of_a_plan_is_written_with_the_base_that_was_found(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shards=2)
    style = adapter(tmp_path / "style", str(base))
    plan = lorafast.plan(None, style)
    written = [shard for part in plan.parts() for shard in part.write(tmp_path / "parts")]
    plan.assemble(tmp_path / "parts", written, tmp_path / "out")
    lorafast.merge(base, style, tmp_path / "expected")
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ([None], lorafast.AdapterError, r"a0: does not name the model .*give the base \(--base\)"),
        ([""], lorafast.AdapterError, "a0: does not name the model"),
        (["b/one", None], lorafast.AdapterError, "a1: does not name the model"),
        (
            ["b/one", "b/two", "b/one"],
            lorafast.PlanError,
            r"name different base models: .*a0 names b/one; .*a1 names b/two; .*a2 names b/one; gi",
        ),
        (["b/one", "b/one@v2"], lorafast.PlanError, "a0 names b/one; .*a1 names b/one@v2"),
        (["./gone"], FileNotFoundError, r"\(the base that adapter_config.json of .*a0 names; give"),
        (["b/one", "b/one@main"], FileNotFoundError, "the hub cannot be reached for it"),
        ([], ValueError, "there are no adapters that could name the base"),
    ],
    ids=["none", "empty", "one-without", "two", "revisions", "gone", "main", "no-adapter"],
)
def test_what_names_no_base_is_an_error(
    tmp_path: Path, named: list[str | None], error: type[Exception], message: str
) -> None:
    adapters = [
        adapter(tmp_path / f"a{place}", base, seed=place) for place, base in enumerate(named)
    ]
    with pytest.raises(error, match=message):
        lorafast.plan(None, adapters)


def test_a_base_given_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path / "base")
    assert lorafast.plan(base, adapter(tmp_path / "a", "b/other")).notes == []
    assert capsys.readouterr().err == ""


def test_a_name_moves_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / "na\x1b[2Jme"
    lorafast.plan(None, adapter(tmp_path / "a", str(make_base(odd))))
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert said.count("\n") == 1


def test_a_base_on_the_hub_is_fetched_at_its_revision(tmp_path: Path) -> None:
    first, second = make_base(tmp_path / "v1"), make_base(tmp_path / "v2", seed=5)
    (tmp_path / "home").mkdir()

    def run(hub: Hub, *words: str) -> str:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        done = hub.run(tmp_path / "home", "merge", "--output", str(out), *words)
        assert done.returncode == 0, done.stderr
        assert re.search("^note: no base was given: owner/base", done.stderr, re.MULTILINE)
        for version in ("v1", "v2"):
            lorafast.merge(tmp_path / version, words[1], out / version)
        [same] = [v for v in ("v1", "v2") if weights(out / v) == weights(out)]
        return same

    with running_hub() as hub:
        repository = hub.add("owner/base", first)
        repository.commit("v2", {p.name: p.read_bytes() for p in second.iterdir()})
        main_one = adapter(tmp_path / "main", "owner/base")
        own = adapter(tmp_path / "own", "owner/base", revision="v2")
        assert run(hub, "--adapters", str(main_one)) == "v1"
        assert run(hub, "--adapters", str(own)) == "v2"
        assert run(hub, "--adapters", str(main_one), "--revision", "v2") == "v2"
        assert run(hub, "--adapters", str(own), "--revision", "main") == "v1"
        # A revision that is given settles what the adapters' say.
        both = [str(main_one), str(own)]
        done = hub.run(tmp_path / "home", "merge", "--dry-run", "--adapters", *both)
        assert "owner/base@v2; give the base" in done.stderr
        done = hub.run(tmp_path / "home", "merge", "--dry-run", "--revision", "v2", "-a", *both)
        assert done.returncode == 0, done.stderr
