"""Merges whose output is on the hub are one commit, on what was there when they began."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lorafast
import pytest
from support.handmade import adapter_tensors, make_adapter, make_base
from support.hub import FRESH, Hub, Repository, running_hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    base = make_base(tmp_path / "base", shards=3)
    (base / "README.md").write_text("---\nlicense: mit\n---\nThe base.\n")
    make_adapter(tmp_path / "style")
    make_adapter(tmp_path / "tone", adapter_tensors(seed=5))
    (tmp_path / "home").mkdir()
    (tmp_path / "scratch").mkdir()
    with running_hub() as server:
        yield server


def publish(hub: Hub, tmp_path: Path, output: str, *words: str, adapter: str = "style") -> Any:
    given = ["--base", str(tmp_path / "base"), "--adapters", str(tmp_path / adapter)]
    more = {"HF_TOKEN": "good", "TMPDIR": str(tmp_path / "scratch")}
    done = hub.run(tmp_path / "home", "merge", *given, "--output", output, *words, **more)
    # What was staged is gone, whatever came of it.
    assert list((tmp_path / "scratch").iterdir()) == []
    assert "Traceback" not in done.stderr
    return done


def local(
    tmp_path: Path, name: str, base: str = "base", adapter: str = "style"
) -> dict[str, bytes]:
    """The files of the same merge into a directory."""
    lorafast.merge(tmp_path / base, tmp_path / adapter, tmp_path / name)
    return {
        path.name: path.read_bytes()
        for path in (tmp_path / name).iterdir()
        if not path.name.startswith("merge_report") and path.name != "lorafast_manifest.json"
    }


def test_a_new_repository_is_one_commit(tmp_path: Path, hub: Hub) -> None:
    done = publish(hub, tmp_path, "hf://me/merged", "--verify")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/merged"]
    assert not repository.private
    assert len(repository.commits) == 2
    sha = repository.branches["main"]
    assert f"note: published: {hub.url}/me/merged/commit/{sha}" in done.stdout
    files = repository.commits[sha]
    expected = local(tmp_path, "expected")
    assert {name: files[name] for name in expected} == expected
    more = {"merge_report.json", "merge_report.md", "lorafast_manifest.json", ".gitattributes"}
    assert files.keys() == {*expected, *more}
    # The card goes along, and nothing tells of this machine.
    assert b"license: mit" in files["README.md"]
    report = json.loads(files["merge_report.json"])
    assert report["output_path"] == "me/merged"
    assert str(tmp_path).encode() not in files["merge_report.json"] + files["merge_report.md"]
    # What was published is read back by its id.
    words = ["--base", str(tmp_path / "base"), "--adapters", str(tmp_path / "style")]
    again = hub.run(tmp_path / "home", "verify", *words, "--merged", "me/merged")
    assert again.returncode == 0, again.stderr


def test_a_repository_is_made_private(tmp_path: Path, hub: Hub) -> None:
    assert publish(hub, tmp_path, "hf://me/merged", "--private").returncode == 0
    assert hub.repositories["me/merged"].private
    hub.repositories["me/open"] = Repository(FRESH)
    done = publish(hub, tmp_path, "hf://me/open", "--private")
    assert done.returncode == 1
    assert "hf://me/open: is a public repository already; make it private" in done.stderr
    assert len(hub.repositories["me/open"].commits) == 1


def test_branches_and_folders(tmp_path: Path, hub: Hub) -> None:
    done = publish(hub, tmp_path, "hf://me/merged@try/sub/folder")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/merged"]
    assert repository.commits[repository.branches["main"]] == FRESH
    files = repository.commits[repository.branches["try"]]
    expected = {f"sub/folder/{name}": data for name, data in local(tmp_path, "expected").items()}
    assert {name: files[name] for name in expected} == expected
    # The same branch with another model beside it.
    assert publish(hub, tmp_path, "hf://me/merged@try").returncode == 1
    assert publish(hub, tmp_path, "hf://me/merged@try/other", adapter="tone").returncode == 0
    files = repository.commits[repository.branches["try"]]
    assert {name.rpartition("/")[0] for name in files} == {"", "sub/folder", "other"}


def test_a_model_is_replaced_when_that_is_asked_for(tmp_path: Path, hub: Hub) -> None:
    assert publish(hub, tmp_path, "hf://me/merged").returncode == 0
    repository = hub.repositories["me/merged"]
    first = repository.branches["main"]
    files = repository.commits[first] | {"notes.txt": b"mine"}
    repository.commit("main", files)
    done = publish(hub, tmp_path, "hf://me/merged", adapter="tone")
    assert done.returncode == 1
    assert "hf://me/merged: is not empty (" in done.stderr
    assert "--overwrite" in done.stderr
    # A base of fewer shards leaves none of the older ones.
    make_base(tmp_path / "small")
    (tmp_path / "base").rename(tmp_path / "large")
    (tmp_path / "small").rename(tmp_path / "base")
    done = publish(hub, tmp_path, "hf://me/merged", "--overwrite", adapter="tone")
    assert done.returncode == 0, done.stderr
    files = repository.commits[repository.branches["main"]]
    expected = local(tmp_path, "expected", adapter="tone")
    assert {name: files[name] for name in expected} == expected
    weights = {name for name in files if ".safetensors" in name}
    assert weights == {name for name in expected if ".safetensors" in name}
    assert files["notes.txt"] == b"mine"


def test_a_pull_request_leaves_the_branch_alone(tmp_path: Path, hub: Hub) -> None:
    assert publish(hub, tmp_path, "hf://me/merged").returncode == 0
    repository = hub.repositories["me/merged"]
    before = dict(repository.branches)
    done = publish(hub, tmp_path, "hf://me/merged", "--pull-request", adapter="tone")
    assert done.returncode == 0, done.stderr
    assert f"note: published: {hub.url}/me/merged/discussions/1" in done.stdout
    assert repository.branches["main"] == before["main"]
    files = repository.commits[repository.branches["refs/pr/1"]]
    expected = local(tmp_path, "expected", adapter="tone")
    assert {name: files[name] for name in expected} == expected
    done = publish(hub, tmp_path, "hf://me/merged@dev", "--pull-request")
    assert "a pull request is made for the main branch; leave @dev out" in done.stderr


def test_whoever_is_faster_wins(tmp_path: Path, hub: Hub) -> None:
    hub.repositories["me/merged"] = Repository(FRESH)

    def interfere() -> None:
        hub.repositories["me/merged"].commit("main", {"theirs.txt": b"x"})

    hub.before_commit = interfere
    done = publish(hub, tmp_path, "hf://me/merged")
    assert done.returncode == 1
    assert "hf://me/merged: somebody else's commit came first, and nothing was" in done.stderr
    repository = hub.repositories["me/merged"]
    assert repository.commits[repository.branches["main"]] == {"theirs.txt": b"x"}


@pytest.mark.parametrize(
    ("output", "words", "message"),
    [
        ("hf://merged", [], "hf://merged: an output on the hub is hf://owner/name[@branch]"),
        ("hf://me/x.git", [], "hf://me/x.git: is no id of the hub"),
        ("out", ["--private"], "private is of outputs on the hub (hf://owner/name)"),
        ("out", ["--pull-request"], "pull_request is of outputs on the hub"),
        ("hf://me/merged", ["--no-safetensors"], "safetensors files alone"),
        ("hf://me/adapter", ["--overwrite"], "an adapter lies there; give another repository"),
    ],
)
def test_what_cannot_be_published(
    tmp_path: Path, hub: Hub, output: str, words: list[str], message: str
) -> None:
    hub.add("me/adapter", tmp_path / "style")
    done = publish(hub, tmp_path, output, *words)
    assert done.returncode == 1
    assert message in done.stderr
    assert set(hub.repositories) == {"me/adapter"}
    assert not (tmp_path / "home" / "hf:").exists()


def test_nobody_publishes_without_a_token_or_the_hub(tmp_path: Path, hub: Hub) -> None:
    words = ["merge", "--base", str(tmp_path / "base"), "--adapters", str(tmp_path / "style")]
    words += ["--output", "hf://me/merged"]
    done = hub.run(tmp_path / "home", *words)
    assert done.returncode == 1
    assert "log in with `hf auth login`, or set HF_TOKEN" in done.stderr
    done = hub.run(tmp_path / "home", *words, HF_TOKEN="good", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "hf://me/merged: nothing is sent to the hub while HF_HUB_OFFLINE is set" in done.stderr
    assert not hub.repositories


def test_other_verbs_write_here(tmp_path: Path) -> None:
    base, style = make_base(tmp_path / "base"), make_adapter(tmp_path / "style")
    merged = tmp_path / "merged"
    lorafast.merge(base, style, merged)
    for call in (
        lambda: lorafast.subtract(merged, style, "hf://me/x"),
        lambda: lorafast.convert(style, "hf://me/x", to="kohya"),
        lambda: lorafast.resize(style, "hf://me/x", rank=1),
        lambda: lorafast.combine([style], "hf://me/x"),
    ):
        with pytest.raises(ValueError, match="only merge writes to the hub"):
            call()
