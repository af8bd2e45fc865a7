"""Nothing of an adapter is passed over in silence: what became of each tensor and config field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._cli.main import main
from support.files import tensor
from support.handmade import adapter_tensors, make_adapter, make_base
from support.reference import PREFIX

EMBEDDING = "model.embed_tokens.weight"
LEFTOVER = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_velora_embed"


def coverage_of(plan: lorafast.MergePlan, position: int = 0) -> dict[str, tuple[str, str]]:
    """By the tensor's name its use and reason."""
    coverage = plan.to_dict()["adapters"][position]["coverage"]
    names = [entry["name"] for entry in coverage["tensors"]]
    assert len(names) == len(set(names))
    return {entry["name"]: (entry["use"], entry["reason"]) for entry in coverage["tensors"]}


def test_every_tensor_and_field_once(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tensors = adapter_tensors() | {LEFTOVER: tensor(np.ones(2))}
    adapter = make_adapter(tmp_path / "adapter", tensors, future=3)
    plan = lorafast.plan(base, adapter, allow=["future"])
    coverage = coverage_of(plan)
    assert coverage.keys() == tensors.keys()
    assert coverage.pop(LEFTOVER)[0] == "not_needed"
    assert {use for use, _ in coverage.values()} == {"used"}
    fields = plan.to_dict()["adapters"][0]["coverage"]["fields"]
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert [entry["name"] for entry in fields] == list(config)
    uses = {entry["name"]: entry["use"] for entry in fields}
    assert uses["r"] == uses["lora_alpha"] == "used"
    assert uses["lora_dropout"] == uses["use_dora"] == "not_needed"
    assert (uses["future"], fields[-1]["reason"]) == ("not_needed", "allowed by name")
    report = lorafast.merge(base, adapter, tmp_path / "out", allow=["future"])
    assert report.coverage == [plan.to_dict()["adapters"][0]["coverage"]]
    written = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert written["coverage"] == report.coverage
    with pytest.warns(DeprecationWarning, match="accounts is deprecated.*use coverage"):
        assert report.accounts == report.coverage
    use = lorafast.inspect(tmp_path / "adapter").tensors_use[0]
    with pytest.warns(DeprecationWarning, match="verdict of a use .*its attribute use"):
        assert use.verdict == use.use
    page = (tmp_path / "out" / "merge_report.md").read_text()
    assert f"not needed: `{LEFTOVER}` (used in training only)" in page
    assert "tensors: 8 used, 1 not needed" in page


def test_what_is_refused_is_listed_without_a_base(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", use_qalora=True, future=3)
    coverage = lorafast.inspect(adapter)["adapter"]["coverage"]
    refused = {e["name"]: e["reason"] for e in coverage["fields"] if e["use"] == "refused"}
    assert refused.keys() == {"use_qalora", "future"}
    assert "QALoRA" in refused["use_qalora"]
    assert {entry["use"] for entry in coverage["tensors"]} == {"used"}


def embedding_case(tmp_path: Path, saved: Any) -> tuple[Path, Path, str]:
    """An adapter on an embedding that carries a base weight of its own."""
    values = np.random.default_rng(2).normal(size=(9, 20))
    base = make_base(tmp_path / "base", others={EMBEDDING: tensor(values)})
    key = f"{PREFIX}model.embed_tokens"
    tensors = {
        f"{key}.lora_embedding_A": tensor(np.ones((4, 9))),
        f"{key}.lora_embedding_B": tensor(np.ones((20, 4))),
        f"{key}.base_layer.weight": tensor(saved(values)),
    }
    return base, make_adapter(tmp_path / "adapter", tensors), f"{key}.base_layer.weight"


def test_a_saved_weight_that_is_the_bases_own(tmp_path: Path) -> None:
    base, adapter, saved = embedding_case(tmp_path, lambda values: values)
    assert coverage_of(lorafast.plan(base, adapter))[saved] == (
        "not_needed",
        f"is the base's own {EMBEDDING} again",
    )


def test_a_saved_weight_of_its_own(tmp_path: Path) -> None:
    base, adapter, saved = embedding_case(tmp_path, lambda values: values + 1)
    assert coverage_of(lorafast.plan(base, adapter))[saved][0] == "used"


def test_what_a_later_adapter_replaces(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    q_proj = "model.layers.0.self_attn.q_proj"
    first = make_adapter(tmp_path / "first")
    saved = adapter_tensors({"model.layers.1.mlp.up_proj": (50, 20)})
    saved[f"{PREFIX}{q_proj}.weight"] = tensor(np.ones((24, 20)))
    later = make_adapter(tmp_path / "later", saved, modules_to_save=["0.self_attn.q_proj"])
    plan = lorafast.plan(base, [first, later])
    assert any("that change is lost" in warning for warning in plan.warnings)
    coverage = coverage_of(plan)
    lost = {name for name, (use, _) in coverage.items() if use == "not_needed"}
    assert lost == {f"{PREFIX}{q_proj}.lora_{letter}.weight" for letter in "AB"}
    assert all("replaced by a later adapter" in coverage[name][1] for name in lost)
    assert {use for use, _ in coverage_of(plan, 1).values()} == {"used"}


def test_a_tensor_that_nothing_is_made_from_is_not_called_used(tmp_path: Path) -> None:
    """Two adapters bring a module that the base does not have; the last one's counts."""
    base = make_base(tmp_path / "base")
    adapters = []
    for number in (1.0, 2.0):
        tensors = adapter_tensors() | {f"{PREFIX}score.weight": tensor(np.full((3, 20), number))}
        path = tmp_path / f"adapter{number:.0f}"
        adapters.append(make_adapter(path, tensors, modules_to_save=["score"]))
    plan = lorafast.plan(base, adapters)
    assert coverage_of(plan, 0)[f"{PREFIX}score.weight"][0] == "not_needed"
    assert coverage_of(plan, 1)[f"{PREFIX}score.weight"][0] == "used"


def test_the_commands_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path / "base")
    tensors = adapter_tensors() | {LEFTOVER: tensor(np.ones(2))}
    adapter = make_adapter(tmp_path / "adapter", tensors)
    merge = ["merge", "--base", str(base), "--adapters", str(adapter), "--dry-run"]
    assert main(merge) == 0
    text = capsys.readouterr().out
    assert "All of adapter\n  tensors: 8 used, 1 not needed; config fields: " in text
    assert LEFTOVER in text
    assert main([*merge, "--json"]) == 0
    coverage = json.loads(capsys.readouterr().out)["adapters"][0]["coverage"]
    assert len(coverage["tensors"]) == 9
    assert main(["inspect", str(adapter)]) == 0
    text = capsys.readouterr().out
    assert "What a merge makes of it\n  tensors: 8 used, 1 not needed; config fields: " in text
    assert "lora_dropout" in text
    unsupported = make_adapter(tmp_path / "unsupported", use_qalora=True)
    assert main(["inspect", str(unsupported)]) == 0
    assert "refused" in capsys.readouterr().out
