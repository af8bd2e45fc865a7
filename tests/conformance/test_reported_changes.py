"""Plans, reports and proofs tell of a tensor as changed where its bytes are not the base's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lorafast
import pytest
from lorafast._cli.main import main
from matrix import Entry, Feature, lora
from support.files import read_checkpoint, write_safetensors
from support.models import VOCABULARY, Models
from test_heads import HEADS, TASKS
from test_matrix import make_adapters
from test_replication import settings as replicated
from test_ties import BASES, HEAD
from test_ties import CASES as TIES
from test_ties import adapter_for as tied
from test_whole_coverage import CASES
from toys import Toys

#: What tells that a tensor is not the base's.
CHANGED = {"merge", "replace", "repeat", "rescale"}


@pytest.fixture(scope="module")
def toys(models: Models) -> Toys:
    return Toys(models)


def check(base: Path, adapters: Sequence[Path], output: Path) -> lorafast.MergePlan:
    """Holds what is told of a merge against what it writes."""
    plan = lorafast.plan(base, adapters)
    report = plan.execute(output)
    before, after = read_checkpoint(base), read_checkpoint(output)
    # A class can call the base's tensor otherwise.
    called = {
        tensor.name: tensor.origin
        for tensor in plan.tensors
        if tensor.origin and tensor.adapter is None and tensor.action != "repeat"
    }
    different = {
        name for name, tensor in after.items() if before.get(called.get(name, name)) != tensor
    }
    told = {tensor.name for tensor in plan.tensors if tensor.action in CHANGED}
    # Norms that were never trained are the same in all layers.
    repeated = {tensor.name for tensor in plan.tensors if tensor.action == "repeat"}
    different |= {name for name in repeated if before.get(name) == after[name]}
    assert told == different
    counts = {
        action: sum(tensor.action == action for tensor in plan.tensors)
        for action in ("merge", "replace", "repeat", "copy", "cast")
    }
    assert counts == {
        "merge": report.tensors_merged,
        "replace": report.tensors_replaced,
        "repeat": report.tensors_repeated,
        "copy": report.tensors_copied,
        "cast": report.tensors_cast,
    }
    for tensor in plan.tensors:
        # What replaces says whose it is.
        assert (tensor.adapter is not None) == (tensor.action == "replace") or tensor.updates
        if tensor.action == "repeat":
            assert tensor.origin is not None
            assert after[tensor.name].data == before[tensor.origin].data
    proof = lorafast.verify(base, adapters, output)
    assert proof.ok, proof.problems
    assert {entry["tensor"] for entry in proof.untouched} == after.keys() - different
    assert proof.tensors_copied == report.tensors_copied + report.tensors_cast
    assert proof.tensors_replaced == report.tensors_replaced + report.tensors_repeated
    return plan


@pytest.mark.parametrize(("feature", "entry"), CASES)
def test_what_is_told_is_what_is_written(
    tmp_path: Path, toys: Toys, feature: Feature, entry: Entry
) -> None:
    check(toys.base(entry.base), make_adapters(toys, feature, entry, "F32"), tmp_path / "out")


@pytest.mark.parametrize("more", [{}, {"use_dora": True}], ids=["plain", "DoRA"])
def test_repeated_layers(tmp_path: Path, toys: Toys, more: dict[str, Any]) -> None:
    base = toys.base("llama")
    adapter = toys.adapter(f"told-{'-'.join(more)}", base, replicated(**more))
    plan = check(base, [adapter], tmp_path / "out")
    repeated = {tensor.name: tensor.origin for tensor in plan.tensors if tensor.action == "repeat"}
    assert repeated["model.layers.2.self_attn.k_proj.weight"] == (
        "model.layers.0.self_attn.k_proj.weight"
    )


@pytest.mark.parametrize("layout", BASES)
@pytest.mark.parametrize("name", TIES)
def test_heads_that_were_tied(tmp_path: Path, toys: Toys, name: str, layout: str) -> None:
    base = BASES[layout](toys.base("tied-llama"), tmp_path / "base")
    check(base, [tied(toys, name)], tmp_path / "out")


@pytest.mark.parametrize("name", HEADS)
def test_heads_that_the_base_lacks(tmp_path: Path, toys: Toys, name: str) -> None:
    kind, class_name, target = HEADS[name]
    base = toys.base(kind)
    task = next(task for word, task in TASKS.items() if f"For{word}" in class_name)
    settings = {"num_labels": 2 if "Question" in class_name else 3, "pad_token_id": 1}
    adapter = toys.adapter(
        f"told-{name}".replace(" ", "_"),
        base,
        lora(target, task_type=task),
        head=(class_name, settings),
    )
    plan = check(base, [adapter], tmp_path / "out")
    brought = {tensor.name for tensor in plan.tensors if tensor.action == "replace"}
    assert brought
    assert not brought & read_checkpoint(base).keys()
    assert {tensor.adapter for tensor in plan.tensors if tensor.action == "replace"} == {0}


@pytest.mark.parametrize("kind", ["llama", "tied-llama"])
def test_a_vocabulary_that_grew(
    tmp_path: Path, toys: Toys, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = toys.base(kind)
    adapter = toys.adapter(
        f"told-vocabulary-{kind}", base, lora("q_proj"), vocabulary=VOCABULARY + 7
    )
    check(base, [adapter], tmp_path / "out")
    flags = ["--base", str(base), "--adapters", str(adapter)]
    assert main(["merge", *flags, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    unchanged = shown[shown.index("no adapter changes") :].split("note:")[0]
    assert "embed_tokens" not in unchanged
    assert "adapters bring whole" in shown
    page = (tmp_path / "out" / "merge_report.md").read_text()
    assert f"{2 if kind == 'llama' else 1} replaced" in page


def test_what_replaces_is_proved_against_the_adapter(tmp_path: Path, toys: Toys) -> None:
    base = toys.base("llama")
    adapter = toys.adapter("told-damaged", base, lora("q_proj", modules_to_save=["lm_head"]))
    lorafast.merge(base, adapter, tmp_path / "out")
    tensors = read_checkpoint(tmp_path / "out")
    damaged = bytearray(tensors[HEAD].data)
    damaged[4] ^= 1
    tensors[HEAD] = replace(tensors[HEAD], data=bytes(damaged))
    write_safetensors(tmp_path / "out" / "model.safetensors", tensors, {"format": "pt"})
    (problem,) = lorafast.verify(base, adapter, tmp_path / "out").problems
    assert problem == (f"tensor {HEAD}: row 0, column 1: is not what the adapter puts in its place")
