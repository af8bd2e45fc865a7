"""`lorafast.verify` proves what is right and names what is not, whoever made the merge."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import lorafast
import numpy as np
import pytest
from lorafast._cli.main import main
from support.files import Tensor, read_checkpoint, tensor
from support.handmade import adapter_tensors, make_adapter, make_base, write_checkpoint
from support.reference import PREFIX, merge_float64

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def merged(tmp_path: Path) -> tuple[Path, Path, Path]:
    base, adapter = make_base(tmp_path / "base", shards=2), make_adapter(tmp_path / "adapter")
    lorafast.merge(base, adapter, tmp_path / "merged")
    return base, adapter, tmp_path / "merged"


def flip(path: Path, tensor: str, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    data[8 + length + header[tensor]["data_offsets"][0] + offset] ^= bit
    path.write_bytes(bytes(data))


def shard_of(directory: Path, tensor: str) -> Path:
    (index,) = directory.glob("*.index.json")
    return directory / json.loads(index.read_text())["weight_map"][tensor]


def changed_tensor(base: Path, adapter: Path, action: str) -> str:
    tensors = lorafast.plan(base, adapter).to_dict()["tensors"]
    name: str = next(entry["name"] for entry in tensors if entry["action"] == action)
    return name


@pytest.mark.parametrize("full", [False, True])
def test_a_right_merge(merged: tuple[Path, Path, Path], full: bool) -> None:
    outcome = lorafast.verify(*merged, full=full)
    assert outcome.ok, outcome.problems
    assert outcome.tensors_merged > 0
    assert outcome.tensors_copied > 0
    assert outcome.to_dict()["ok"] is True
    assert "ok" in repr(outcome)


def test_a_merge_of_another_hand(merged: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A result in another dtype than the base's is held against that dtype."""
    base, adapter, _ = merged
    for dtype in ("float32", "float16"):
        lorafast.merge(base, adapter, tmp_path / dtype, dtype=dtype)
        outcome = lorafast.verify(base, adapter, tmp_path / dtype)
        assert outcome.ok, outcome.problems


@pytest.mark.parametrize("action", ["copy", "merge"])
def test_one_flipped_bit(merged: tuple[Path, Path, Path], action: str) -> None:
    base, adapter, output = merged
    name = changed_tensor(base, adapter, action)
    # The sign of the second element, or a high bit of it: far outside any rounding.
    flip(shard_of(output, name), name, 3, 0x40)
    outcome = lorafast.verify(base, adapter, output)
    assert not outcome.ok
    assert name in outcome.problems[0]
    assert "row 0" in outcome.problems[0]


def test_another_strategy(merged: tuple[Path, Path, Path]) -> None:
    base, adapter, output = merged
    outcome = lorafast.verify(base, adapter, output, strategy="weighted", weights=[2.0])
    assert "times the right one" in outcome.problems[0]


def test_the_base_itself(merged: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = merged
    shutil.copytree(base, tmp_path / "copy")
    outcome = lorafast.verify(base, adapter, tmp_path / "copy")
    assert "as if nothing had been merged" in outcome.problems[0]


def test_a_wrong_index(merged: tuple[Path, Path, Path]) -> None:
    base, adapter, output = merged
    (index,) = output.glob("*.index.json")
    content = json.loads(index.read_text())
    content["metadata"]["total_size"] = len(content["weight_map"])
    index.write_text(json.dumps(content))
    assert "total_size" in lorafast.verify(base, adapter, output).problems[0]


def test_two_shards_swapped(merged: tuple[Path, Path, Path]) -> None:
    base, adapter, output = merged
    first, second = sorted(output.glob("*.safetensors"))[:2]
    between = output / "between"
    first.rename(between)
    second.rename(first)
    between.rename(second)
    outcome = lorafast.verify(base, adapter, output)
    assert re.search(r"places tensor model\.\S+ in \S+, but it stands in", outcome.problems[0])


def rewritten(directory: Path, change: Callable[[dict[str, Tensor]], None], shards: int) -> Path:
    """The checkpoint after a change, in that many shards."""
    tensors = read_checkpoint(directory)
    for file in [*directory.glob("*.safetensors"), *directory.glob("*.index.json")]:
        file.unlink()
    change(tensors)
    write_checkpoint(directory, tensors, shards=shards)
    return directory


@pytest.mark.parametrize("shards", [1, 3])
def test_other_shards(merged: tuple[Path, Path, Path], shards: int) -> None:
    base, adapter, output = merged
    rewritten(output, lambda _: None, shards)
    outcome = lorafast.verify(base, adapter, output, full=True)
    assert outcome.ok, outcome.problems


def test_another_prefix(merged: tuple[Path, Path, Path]) -> None:
    """Who saves the backbone alone, or a larger model around it, changes all names alike."""
    base, adapter, output = merged

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewritten(output, rename, 2)
    outcome = lorafast.verify(base, adapter, output)
    assert outcome.ok, outcome.problems
    assert any("'model.'" in w or '"model."' in w for w in outcome.warnings)
    name = f"{Q_PROJ}.weight".removeprefix("model.")
    flip(shard_of(output, name), name, 3, 0x40)
    assert Q_PROJ in lorafast.verify(base, adapter, output).problems[0]


def test_a_lost_module(merged: tuple[Path, Path, Path]) -> None:
    """As a tool that knows some layers and passes over others in silence."""
    base, adapter, output = merged
    weight = f"{Q_PROJ}.weight"
    rewritten(output, lambda t: t.update({weight: read_checkpoint(base)[weight]}), 2)
    (problem,) = lorafast.verify(base, adapter, output).problems
    assert weight in problem
    assert "row 0, column 0" in problem
    assert "as if nothing had been merged" in problem


def test_a_doubled_scale(merged: tuple[Path, Path, Path]) -> None:
    base, adapter, output = merged
    weight = f"{Q_PROJ}.weight"

    def double(tensors: dict[str, Tensor]) -> None:
        start = read_checkpoint(base)[weight].float64()
        tensors[weight] = tensor(2 * tensors[weight].float64() - start)

    rewritten(output, double, 2)
    (problem,) = lorafast.verify(base, adapter, output).problems
    assert weight in problem
    assert re.search(r"stored change is (2\.0|1\.99)\d* times the right one", problem)


def test_two_tensors_swapped(merged: tuple[Path, Path, Path]) -> None:
    base, adapter, output = merged
    names = [f"{Q_PROJ}.weight", f"{Q_PROJ}.weight".replace("layers.0", "layers.1")]

    def swap(tensors: dict[str, Tensor]) -> None:
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]

    rewritten(output, swap, 2)
    problems = lorafast.verify(base, adapter, output).problems
    assert [next(n for n in names if n in p) for p in problems] == names


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "integers"])
def test_tensors_that_are_none_of_the_merges(merged: tuple[Path, Path, Path], change: str) -> None:
    base, adapter, output = merged
    weight = f"{Q_PROJ}.weight"

    def damage(tensors: dict[str, Tensor]) -> None:
        if change == "missing":
            del tensors[weight]
        elif change == "extra":
            tensors["model.stranger"] = tensor(np.ones(3))
        elif change == "shape":
            old = tensors[weight]
            tensors[weight] = Tensor(old.dtype, old.shape[::-1], old.data)
        else:
            tensors[weight] = tensor(np.ones(tensors[weight].shape), "I32")

    rewritten(output, damage, 1)
    (problem,) = lorafast.verify(base, adapter, output).problems
    words = {"missing": "is missing", "extra": "neither", "shape": "has shape", "integers": "I32"}
    assert words[change] in problem
    assert ("model.stranger" if change == "extra" else weight) in problem


TIED = {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"], "vocab_size": 9}
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def tied(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base whose head shares the embeddings, and an adapter that changes both alike."""
    random = np.random.default_rng(3)
    others = {EMBEDDING: tensor(random.normal(size=(9, 20)))}
    base = make_base(tmp_path / "base", others=others, config=TIED)
    rows = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((2, 20))}
    adapter = make_adapter(
        tmp_path / "adapter",
        adapter_tensors() | {key: tensor(value) for key, value in rows.items()},
        trainable_token_indices=[1, 4],
    )
    lorafast.merge(base, adapter, tmp_path / "merged")
    return base, adapter, tmp_path / "merged"


def test_a_tied_head_that_is_written_out(tied: tuple[Path, Path, Path]) -> None:
    base, adapter, output = tied
    rewritten(output, lambda t: t.update({"lm_head.weight": t[EMBEDDING]}), 1)
    outcome = lorafast.verify(base, adapter, output)
    assert outcome.ok, outcome.problems
    assert any("lm_head.weight" in warning for warning in outcome.warnings)


def test_a_stale_tied_head(tied: tuple[Path, Path, Path]) -> None:
    base, adapter, output = tied
    before = read_checkpoint(base)[EMBEDDING]
    rewritten(output, lambda t: t.update({"lm_head.weight": before}), 1)
    (problem,) = lorafast.verify(base, adapter, output).problems
    assert "lm_head.weight differs from model.embed_tokens.weight" in problem
    assert "stale" in problem


def test_a_tie_that_was_lost(tied: tuple[Path, Path, Path]) -> None:
    base, adapter, output = tied
    config = json.loads((output / "config.json").read_text()) | {"tie_word_embeddings": False}
    (output / "config.json").write_text(json.dumps(config))
    (problem,) = lorafast.verify(base, adapter, output).problems
    assert "there is no head" in problem


def test_a_head_of_the_base_that_the_merge_stores_once(tmp_path: Path) -> None:
    """A base that holds both of a tied pair, and a merge that holds the one they are."""
    values = np.random.default_rng(3).normal(size=(9, 20))
    others = {EMBEDDING: tensor(values), "lm_head.weight": tensor(values)}
    base = make_base(tmp_path / "base", others=others, config=TIED)
    adapter = make_adapter(tmp_path / "adapter")
    lorafast.merge(base, adapter, tmp_path / "merged")
    rewritten(tmp_path / "merged", lambda t: t.pop("lm_head.weight") and None, 1)
    outcome = lorafast.verify(base, adapter, tmp_path / "merged")
    assert outcome.ok, outcome.problems


def test_digests_of_what_is_untouched(merged: tuple[Path, Path, Path]) -> None:
    base, adapter, output = merged
    before = read_checkpoint(base)
    digests = {e["tensor"]: e["sha256"] for e in lorafast.verify(*merged).untouched}
    entries = lorafast.plan(base, adapter).to_dict()["tensors"]
    assert set(digests) == {entry["name"] for entry in entries if entry["action"] == "copy"}
    for name, digest in digests.items():
        assert digest == hashlib.sha256(before[name].data).hexdigest()
    name = next(iter(digests))
    flip(shard_of(output, name), name, 0, 1)
    assert name not in {e["tensor"] for e in lorafast.verify(*merged).untouched}


def test_an_adapter_that_drowns_in_rounding_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="BF16", scale=1.0)
    strong = make_adapter(tmp_path / "strong", adapter_tensors(scale=0.5))
    weak = make_adapter(tmp_path / "weak", adapter_tensors(scale=0.01, seed=3))
    lorafast.merge(base, [strong, weak], tmp_path / "merged")
    outcome = lorafast.verify(base, [strong, weak], tmp_path / "merged", full=True)
    assert outcome.ok, outcome.problems
    (warning,) = outcome.warnings
    assert str(weak) in warning
    assert str(strong) not in warning
    lost = {entry["adapter"]: entry["lost"] for entry in outcome.adapters}
    # ‖rounded - exact‖ / ‖s·B·A‖ of each, in float64.
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "merged")
    exact = merge_float64(before, [strong, weak])
    error = sum(np.square(after[n].float64() - t.value).sum() for n, t in exact.items())
    for adapter in (strong, weak):
        alone = merge_float64(before, [adapter])
        change = sum(np.square(t.value - before[n].float64()).sum() for n, t in alone.items())
        assert lost[str(adapter)] == pytest.approx(np.sqrt(error / change), rel=1e-9)
    wide = lorafast.merge(base, [strong, weak], tmp_path / "wide", dtype="float32", verify=True)
    assert wide.warnings == []


def test_a_config_of_another_type_than_the_weights(merged: tuple[Path, Path, Path]) -> None:
    base, adapter, output = merged
    rewritten(output, lambda t: t.update({n: as_bf16(v) for n, v in t.items()}), 1)
    outcome = lorafast.verify(base, adapter, output)
    assert outcome.ok, outcome.problems
    assert any("config.json: says float32" in warning for warning in outcome.warnings)


def as_bf16(value: Tensor) -> Tensor:
    return tensor(value.float64(), "BF16")


def test_what_is_not_there(merged: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = merged
    with pytest.raises(FileNotFoundError, match="absent"):
        lorafast.verify(base, adapter, tmp_path / "absent")


def test_merge_verifies_itself(merged: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = merged
    report = lorafast.merge(base, adapter, tmp_path / "again", verify=True)
    assert report.verification is not None
    assert report.verification["ok"]
    assert np.isfinite(report.verification["lost"])


def test_the_command(merged: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, output = merged
    words = ["verify", "--base", str(base), "--adapters", str(adapter), "--merged", str(output)]
    assert main(words) == 0
    assert "The merge is right" in capsys.readouterr().out
    name = changed_tensor(base, adapter, "copy")
    flip(shard_of(output, name), name, 0, 1)
    assert main([*words, "--quiet"]) == 3
    assert name in capsys.readouterr().out
    assert main([*words, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["ok"] is False
