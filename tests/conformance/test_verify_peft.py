"""What PEFT merges and transformers saves is proved as it is: its shards, names and roundings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from matrix import FEATURES, Entry, Feature
from support.files import read_checkpoint
from support.handmade import write_checkpoint
from support.models import Models, state
from test_matrix import make_adapters
from toys import MODULES, Toys, merge_with_peft, quiet

CASES = [
    pytest.param(feature, entry, dtype, id=f"{feature.name}-{entry.name}-{dtype}".replace(" ", "_"))
    for feature in FEATURES
    for entry in feature.entries
    # Roundings show in 16 bits; in 32 the bases that transformers saves are enough.
    for dtype in (["BF16"] if entry.base in MODULES else ["BF16", "F32"])
    if not feature.peft_fails
]


@pytest.fixture(scope="module")
def toys(models: Models) -> Toys:
    return Toys(models)


def saved_by_peft(
    toys: Toys, folder: Path, case: tuple[Feature, Entry, str], shard: str = "30KB"
) -> tuple[Path, list[Path], Path]:
    feature, entry, dtype = case
    base = toys.base(entry.base, dtype)
    adapters = make_adapters(toys, feature, entry, "F32")
    model: Any = merge_with_peft(base, adapters)
    if entry.base in MODULES:
        folder.mkdir()
        shutil.copy(base / "config.json", folder)
        write_checkpoint(folder, state(model), shards=3)
    else:
        with quiet():
            model.save_pretrained(folder, max_shard_size=shard)
    return base, adapters, folder


@pytest.mark.parametrize(("feature", "entry", "dtype"), CASES)
def test_peft_s_own_output(
    toys: Toys, tmp_path: Path, feature: Feature, entry: Entry, dtype: str
) -> None:
    inputs = saved_by_peft(toys, tmp_path / "merged", (feature, entry, dtype))
    outcome = lorafast.verify(*inputs, compat="peft", full=True)
    assert outcome.ok, outcome.problems
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    strict = lorafast.verify(*inputs)
    if (dtype == "F32" and not feature.decomposed) or feature.roundings == 1:
        assert strict.ok, strict.problems


@pytest.mark.parametrize(
    ("name", "which"),
    [("Embedding", 0), ("Two and three adapters", 0), ("Linear", 0), ("`lora_bias`", 0)],
)
def test_what_peft_merged_is_taken_out_again(
    toys: Toys, tmp_path: Path, name: str, which: int
) -> None:
    """The base comes back to within the bound that is stated for PEFT's roundings."""
    feature = next(f for f in FEATURES if f.name == name)
    case = (feature, feature.entries[which], "BF16")
    base, adapters, merged = saved_by_peft(toys, tmp_path / "merged", case)
    report = lorafast.subtract(merged, adapters, tmp_path / "out", compat="peft")
    assert report.bound is not None
    assert "as PEFT does" in report.exactness()
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    changed = [
        e["name"] for e in lorafast.plan(base, adapters).to_dict()["tensors"] if e["updates"]
    ]
    errors = [np.abs(after[n].float64() - before[n].float64()) for n in changed]
    assert 0 < max(error.max() for error in errors) <= report.bound["largest"]
    assert sum(np.square(error).sum() for error in errors) <= report.bound["norm"] ** 2
    # It is rounding alone that stays, and of what was merged most is gone.
    assert report.bound["share"] < 0.5
    lorafast.subtract(merged, adapters, tmp_path / "exact", original=base, compat="peft")
    assert read_checkpoint(tmp_path / "exact") == before


def test_the_allowance_hides_no_factor(toys: Toys, tmp_path: Path) -> None:
    """With PEFT's roundings let pass, a doubled scale is found all the same."""
    feature = next(f for f in FEATURES if f.name == "Embedding")
    entry = next(e for e in feature.entries if e.base == "gpt2")
    case = (feature, entry, "BF16")
    base, adapters, merged = saved_by_peft(toys, tmp_path / "merged", case, "1GB")
    assert lorafast.verify(base, adapters, merged, compat="peft").ok
    doubled = tmp_path / "doubled"
    doubled.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (doubled / name).write_bytes((adapters[0] / name).read_bytes())
    config = json.loads((doubled / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (doubled / "adapter_config.json").write_text(json.dumps(config))
    outcome = lorafast.verify(base, [doubled], merged, compat="peft")
    entries = lorafast.plan(base, doubled).to_dict()["tensors"]
    (changed,) = [entry["name"] for entry in entries if entry["updates"]]
    assert changed in read_checkpoint(merged)
    assert changed in outcome.problems[0]
