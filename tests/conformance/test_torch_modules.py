"""Every entry of the matrix merged into a loaded module, against float64 and the merged files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lorafast
import lorafast.torch
import pytest
import torch
from matrix import FEATURES, Entry, Feature
from support.compare import assert_merged_like_float64
from support.files import read_checkpoint
from support.models import Models
from support.reference import merge_float64
from test_matrix import FEW_PAIRS, IDENTICAL, make_adapters
from test_ties import CASES as TIES
from test_ties import adapter_for
from test_torch_matrix import assert_like_the_cpu
from toys import Toys, is_transposed, load, quiet, written

CASES = [
    pytest.param(feature, entry, id=f"{feature.name}-{entry.name}".replace(" ", "_"))
    for feature in FEATURES
    for entry in feature.entries
]


def copy_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: Any, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize(("feature", "entry"), CASES)
def test_entry(models: Models, tmp_path: Path, feature: Feature, entry: Entry) -> None:
    toys = Toys(models)
    transposed = is_transposed(entry.base, entry.configs[0])
    for base_dtype, adapter_dtype in FEW_PAIRS[:3]:
        base = toys.base(entry.base, base_dtype)
        adapters = make_adapters(toys, feature, entry, adapter_dtype)
        folder = tmp_path / base_dtype
        lorafast.merge(base, adapters, folder / "cpu")
        with quiet():
            model = load(base)
        before = copy_of(model)
        handle = lorafast.torch.merge_into(model, adapters)
        ours = written(model, folder / "ours")
        terms = merge_float64(read_checkpoint(base), adapters, transposed=transposed)
        assert_merged_like_float64(ours, terms, identical=IDENTICAL)
        assert_like_the_cpu(ours, read_checkpoint(folder / "cpu"), terms)
        untouched = {name for name in before if name not in handle.tensors}
        now = model.state_dict()
        assert [name for name in untouched if not torch.equal(before[name], now[name])] == []
        restoration = handle.unmerge()
        assert restoration.exact
        assert_same_state(model, before)


@pytest.mark.parametrize("name", TIES)
def test_tied_embeddings_part_where_the_merged_files_do(
    models: Models, tmp_path: Path, name: str
) -> None:
    toys = Toys(models)
    base = toys.base("tied-llama")
    adapter, (_, is_tied) = adapter_for(toys, name), TIES[name]
    lorafast.merge(base, adapter, tmp_path / "merged")
    with quiet():
        model, expected = load(base), load(tmp_path / "merged")
    before, shared = copy_of(model), model.lm_head.weight
    handle = lorafast.torch.merge_into(model, adapter)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
    for key, value in expected.state_dict().items():
        assert torch.allclose(model.state_dict()[key], value, rtol=1e-6, atol=1e-7), key
    handle.unmerge()
    assert_same_state(model, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight is shared
