"""Ids on the hub: how they are spelled, and what is fetched by them from a hub on the loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import lorafast
import pytest
from lorafast._io.hub import HubId, parse, with_revision
from support.handmade import adapter_tensors, make_adapter, make_base
from support.hub import Hub, running_hub

NAME = "model.safetensors"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpt2", HubId("gpt2")),
        ("owner/name", HubId("owner/name")),
        ("owner/name/", HubId("owner/name")),
        ("owner/name@main", HubId("owner/name", "main")),
        ("owner/na.me_2-x@v1.0", HubId("owner/na.me_2-x", "v1.0")),
        ("owner/name/sub", HubId("owner/name", None, "sub")),
        ("owner/name/sub/folder/", HubId("owner/name", None, "sub/folder")),
        ("owner/name@v1/sub/folder", HubId("owner/name", "v1", "sub/folder")),
        ("owner/name@refs/pr/12", HubId("owner/name", "refs/pr/12")),
        ("owner/name@refs/pr/12/sub", HubId("owner/name", "refs/pr/12", "sub")),
        ("owner/name@a%2Fb/sub", HubId("owner/name", "a/b", "sub")),
        ("hf://owner/name@v1/sub", HubId("owner/name", "v1", "sub")),
        ("hf://models/owner/name/sub", HubId("owner/name", None, "sub")),
        ("./owner/name", None),
        ("/owner/name", None),
        ("~/owner/name", None),
        ("owner/../name", None),
        ("owner/name/../sub", None),
        ("owner/name@", None),
        ("owner/name@/sub", None),
        ("owner/na--me", None),
        ("owner/name.git", None),
        ("C:\\owner\\name", None),
        ("two words/name", None),
        ("gpt2@v1/sub", None),
        ("", None),
        (Path("owner/name"), None),
    ],
    ids=str,
)
def test_how_ids_are_spelled(text: str, expected: HubId | None) -> None:
    assert parse(text) == expected
    if expected is not None:
        # What it is written as means the same.
        assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["hf://datasets/owner/name", "hf://spaces/a/b", "hf://", "hf:///x", "hf://a/../b"]
)
def test_what_begins_as_an_id_is_one_or_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}: "):
        lorafast.inspect(text)


def test_a_file_of_weights_is_named_with_its_folder() -> None:
    named = parse("owner/name/sub/style.safetensors")
    assert named is not None
    assert (named.folder, named.file) == ("sub", "style.safetensors")


def test_a_revision_goes_with_a_base_on_the_hub_alone(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    assert with_revision("owner/name/sub", "a/b") == "hf://owner/name@a%2Fb/sub"
    assert with_revision("owner/name@v1", "v1") == "hf://owner/name@v1"
    with pytest.raises(ValueError, match="its revision is v1, and revision='v2' is another"):
        lorafast.plan("owner/name@v1", adapter, revision="v2")
    with pytest.raises(ValueError, match=r"revision='v2' is of a base on the hub, and .* a path"):
        lorafast.merge(base, adapter, tmp_path / "out", revision="v2")
    with pytest.raises(ValueError, match="revision must be a branch"):
        lorafast.plan("owner/name", adapter, revision="")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with a base in two revisions, and adapters in a repository and in folders of one."""
    make_base(tmp_path / "base", shards=2)
    make_base(tmp_path / "base-v2", shards=2, seed=7)
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\nThe base.\n")
    (tmp_path / "base" / "LICENSE").write_text("MIT")
    make_adapter(tmp_path / "adapter")
    several = tmp_path / "several"
    make_adapter(several / "style", adapter_tensors(seed=3))
    make_adapter(several / "deep" / "tone", adapter_tensors(seed=4))
    (several / "empty").mkdir()
    (several / "empty" / "notes.bin").write_bytes(b"x")
    with running_hub() as server:
        repository = server.add("owner/base", tmp_path / "base")
        files = {path.name: path.read_bytes() for path in (tmp_path / "base-v2").iterdir()}
        repository.commit("refs/pr/1", files)
        repository.commit("feature/x", {f"sub/{name}": data for name, data in files.items()})
        server.add("owner/adapter", tmp_path / "adapter")
        server.add("owner/several", several)
        (tmp_path / "home").mkdir()
        yield server


def weights(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def merged(tmp_path: Path, hub: Hub, *words: str, **more: str) -> dict[str, bytes]:
    """What a merge of the command wrote."""
    out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
    done = hub.run(tmp_path / "home", "merge", *words, "--output", str(out), "--quiet", **more)
    assert done.returncode == 0, done.stderr
    return weights(out)


@pytest.mark.parametrize(
    "case",
    [
        ("owner/base", [], "base", "owner/adapter", "adapter"),
        ("hf://owner/base@main", [], "base", "hf://owner/adapter@main", "adapter"),
        ("owner/base@refs/pr/1", [], "base-v2", "owner/adapter", "adapter"),
        ("owner/base", ["--revision", "refs/pr/1"], "base-v2", "owner/adapter", "adapter"),
        ("owner/base@feature%2Fx/sub", [], "base-v2", "owner/several/style", "several/style"),
        (
            "owner/base/sub",
            ["--revision", "feature/x"],
            "base-v2",
            "owner/several/deep/tone/adapter_model.safetensors",
            "several/deep/tone",
        ),
    ],
    ids=["id", "url", "pull-request", "flag", "folders", "file"],
)
def test_bases_and_adapters_are_fetched_and_found_again_offline(
    tmp_path: Path,
    hub: Hub,
    case: tuple[str, list[str], str, str, str],
) -> None:
    base, words, local, adapter, local_adapter = case
    lorafast.merge(tmp_path / local, tmp_path / local_adapter, tmp_path / "expected")
    expected = weights(tmp_path / "expected")
    given = ["--base", base, "--adapters", adapter, *words]
    assert merged(tmp_path, hub, *given) == expected
    [out] = tmp_path.glob("out-*")
    assert {path.name for path in out.iterdir()} == {
        path.name for path in (tmp_path / "expected").iterdir()
    }
    assert ("license: mit" in (out / "README.md").read_text()) == (local == "base")
    fetched = [line for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
    assert len(fetched) == len(set(fetched))
    if "several" in adapter:
        # Of the folder alone.
        own = [line for line in fetched if "owner/several" in line]
        assert own
        assert all(f"/{local_adapter.partition('/')[2]}/" in line for line in own)
    hub.requests.clear()
    assert merged(tmp_path, hub, *given, HF_HUB_OFFLINE="1") == expected
    assert merged(tmp_path, hub, *given, "--local-files-only") == expected
    assert not hub.requests


def test_other_commands_take_ids(tmp_path: Path, hub: Hub) -> None:
    home = tmp_path / "home"
    for words in (
        ["analyze", "owner/several/style", "--base", "owner/base", "--quiet"],
        ["inspect", "owner/base@refs/pr/1"],
        ["compare", "owner/several/style", "owner/adapter@main", "--quiet"],
        [
            "convert",
            "owner/several/style",
            "--to",
            "kohya",
            "--output",
            str(tmp_path / "k.safetensors"),
        ],
        ["verify", "--base", "owner/base", "--adapters", "owner/adapter", "--merged", "owner/base"],
        ["lineage", "owner/adapter", "owner/several/style"],
    ):
        done = hub.run(home, *words)
        assert done.returncode == (3 if words[0] == "verify" else 0), (words, done.stderr)
    done = hub.run(home, "scan", "owner/several", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    names = [row["name"] for row in json.loads(done.stdout)["adapters"]]
    assert names == ["deep/tone", "style"]
    done = hub.run(home, "similarity", "owner/several/style", "owner/adapter", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["names"] == ["owner/several/style", "owner/adapter"]


def test_a_path_wins_over_an_id(tmp_path: Path, hub: Hub) -> None:
    work = tmp_path / "work"
    make_adapter(work / "owner" / "several" / "style", adapter_tensors(seed=9))
    lorafast.merge(tmp_path / "base", work / "owner/several/style", tmp_path / "expected")
    words = ["--base", str(tmp_path / "base"), "--adapters", "owner/several/style"]
    out = str(tmp_path / "out")
    done = hub.run(tmp_path / "home", "merge", *words, "--output", out, cwd=work)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")
    assert not hub.requests
    # An URL is never a path.
    words[-1] = f"hf://{words[-1]}"
    done = hub.run(tmp_path / "home", "merge", *words, "--dry-run", "--json", cwd=work)
    assert "models--owner--several" in json.loads(done.stdout)["adapters"][0]["path"]


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            "owner/nothing",
            "no public repository of that name on the hub (for a private one, log in",
        ),
        ("owner/adapter@v9", "No revision 'v9' of owner/adapter on the hub: owner/adapter@v9"),
        ("owner/several/other", "No folder 'other' in the repository owner/several on the hub"),
        ("owner/several@main/a/b", "No folder 'a/b' in the repository owner/several at main on"),
        ("owner/several/x.gguf", "No file 'x.gguf' in the repository owner/several on the hub"),
        ("owner/several/empty", "holds nothing on the hub that could be read (it has notes.bin)"),
        ("owner/gated", "owner/gated: is gated: ask for access at http://127.0.0.1:"),
        ("owner/private", "no public repository of that name on the hub"),
    ],
)
def test_what_is_not_there_is_said(tmp_path: Path, hub: Hub, adapter: str, message: str) -> None:
    hub.add("owner/gated", tmp_path / "adapter", gated=True)
    hub.add("owner/private", tmp_path / "adapter", token="good")
    words = ["merge", "--base", str(tmp_path / "base"), "--adapters", adapter, "--dry-run"]
    done = hub.run(tmp_path / "home", *words)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_tokens_are_those_of_the_client(tmp_path: Path, hub: Hub) -> None:
    hub.add("owner/private", tmp_path / "adapter", token="good")
    words = ["merge", "--base", str(tmp_path / "base"), "--adapters", "owner/private", "--dry-run"]
    assert hub.run(tmp_path / "home", *words, HF_TOKEN="good").returncode == 0
    done = hub.run(tmp_path / "home", *words[:-2], "owner/adapter", "--dry-run", HF_TOKEN="bad")
    assert done.returncode == 1
    assert "the hub does not accept the token (401); log in with `hf auth login`" in done.stderr
    (tmp_path / "other").mkdir()
    done = hub.run(tmp_path / "other", *words, HF_TOKEN="good", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "the hub cannot be reached for it, nor is all of it in its cache" in done.stderr
