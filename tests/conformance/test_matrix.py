"""Every entry of the matrix, in every pair of dtypes: PEFT's merge of the same files and ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import lorafast
import numpy as np
import pytest
from matrix import FEATURES, REFUSALS, Entry, Feature, Refusal
from support.compare import (
    assert_merged_like,
    assert_merged_like_float64,
    assert_rest_untouched,
)
from support.files import Tensor, read_checkpoint
from support.models import Models
from support.reference import Merged, merge_float64
from toys import MODULES, Toys, assert_same_outputs, is_transposed, merge_with_peft, written

DTYPES = ["F32", "BF16", "F16"]
# Relative error of one rounding to nearest.
HALF_ULP = {"F32": 2.0**-24, "BF16": 2.0**-8, "F16": 2.0**-11}
# Half of the distance between float16's smallest numbers.
SMALLEST = {"F32": 0.0, "BF16": 0.0, "F16": 2.0**-25}
# Some tensors are small, and float16's steps are near to a float32 sum's error in large terms.
IDENTICAL = 0.995

PAIRS = [(base, adapter) for base in DTYPES for adapter in DTYPES]
# Every dtype of either is in one pair: what is quick, and all that is tried where PEFT is slow.
FEW_PAIRS = [("F32", "F32"), ("BF16", "F32"), ("F16", "BF16"), ("F32", "F16")]
CASES = [
    pytest.param(
        feature,
        entry,
        dtypes,
        id=f"{feature.name}-{entry.name}-{'-'.join(dtypes)}".replace(" ", "_"),
        marks=[] if dtypes in FEW_PAIRS else [pytest.mark.exhaustive],
    )
    for feature in FEATURES
    for entry in feature.entries
    for dtypes in (FEW_PAIRS if feature.few else PAIRS)
]


@pytest.fixture
def toys(models: Models) -> Toys:
    return Toys(models)


def make_adapters(toys: Toys, feature: Feature, entry: Entry, dtype: str) -> list[Path]:
    base = toys.base(entry.base)
    return [
        toys.adapter(
            f"{feature.name}-{entry.name}-{number}".replace("/", "").replace(" ", "_"),
            base,
            dict(config),
            dtype=dtype,
            seed=number,
        )
        for number, config in enumerate(entry.configs)
    ]


@pytest.mark.parametrize(("feature", "entry", "dtypes"), CASES)
def test_entry(
    toys: Toys, tmp_path: Path, feature: Feature, entry: Entry, dtypes: tuple[str, str]
) -> None:
    base_dtype, adapter_dtype = dtypes
    base = toys.base(entry.base, base_dtype)
    adapters = make_adapters(toys, feature, entry, adapter_dtype)
    report = lorafast.merge(base, adapters if len(adapters) > 1 else adapters[0], tmp_path / "out")

    before = read_checkpoint(base)
    ours = read_checkpoint(tmp_path / "out")
    transposed = is_transposed(entry.base, entry.configs[0])
    terms = merge_float64(before, adapters, transposed=transposed)
    assert_rest_untouched(ours, before, terms)
    still = [name for name in terms if ours[name] == before[name]]
    assert not still, f"left as they were: {still}"
    assert 0 < report.tensors_merged <= len(terms)
    assert len(adapters) > 1 or not report.warnings
    assert_merged_like_float64(ours, terms, identical=IDENTICAL)
    if feature.peft_fails:
        with pytest.raises(RuntimeError):
            merge_with_peft(base, adapters)
        return

    if entry.base not in MODULES and base_dtype == adapter_dtype == "F32":
        assert_same_outputs(tmp_path / "out", merge_with_peft(base, adapters))
    theirs = written(merge_with_peft(base, adapters), tmp_path / "theirs")
    assert_same_names(ours, theirs)
    if feature.decomposed:
        terms = {
            name: with_decomposition_error(term, ours[name].dtype) for name, term in terms.items()
        }
    if feature.roundings == 1:
        assert_merged_like(ours, theirs, terms, identical=IDENTICAL)
    else:
        assert_several_roundings(ours, theirs, terms, feature.roundings)
    for name in theirs.keys() & before.keys() - terms.keys():
        assert theirs[name] == before[name], f"{name}: PEFT changed what no reference knows of"


def with_decomposition_error(term: Merged, dtype: str) -> Merged:
    """The size of the terms raised to where their rounding explains PEFT's float32 decomposition.

    An SVD in float32 is off by some units of its largest singular value, whatever the element.
    """
    largest = np.linalg.norm(term.value, 2)
    error = 8 * largest * HALF_ULP["F32"]
    return Merged(term.value, term.magnitude + error / HALF_ULP[dtype])


def assert_same_names(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """The same names and shapes in both, but for what is one tensor under two names."""
    assert ours.keys() <= theirs.keys(), f"not in PEFT's: {ours.keys() - theirs.keys()}"
    for name in theirs.keys() - ours.keys():
        assert theirs[name] in ours.values(), f"{name} is missing"
    wrong = [name for name in ours if ours[name].shape != theirs[name].shape]
    assert not wrong, f"of another shape than PEFT's: {wrong}"


def assert_several_roundings(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    terms: Mapping[str, Merged],
    roundings: int,
) -> None:
    """No further apart than PEFT's roundings and our one explain, and ours the nearer one."""
    for name, term in terms.items():
        dtype = ours[name].dtype
        assert theirs[name].dtype == dtype
        unit = HALF_ULP[dtype] * term.magnitude + SMALLEST[dtype]
        # In float32 the sums' own rounding is as large: the bound of `assert_merged_like`.
        allowed = (roundings + 1) * unit
        if dtype == "F32":
            allowed = np.maximum(allowed, 1e-6 * np.abs(term.value) + 4 * unit)
        apart = np.abs(ours[name].float64() - theirs[name].float64())
        assert (apart <= allowed).all(), f"{name}: {np.max(apart / allowed)} of what is allowed"
        if dtype != "F32":
            our_error = np.abs(ours[name].float64() - term.value).mean()
            their_error = np.abs(theirs[name].float64() - term.value).mean()
            # Where PEFT's second rounding changes nothing, ties that fall otherwise are left.
            nearer = our_error <= their_error * (1 + 1e-5)
            assert nearer, f"{name}: PEFT is nearer to the exact value"


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name.replace(" ", "_"))
def test_refused_by_name(toys: Toys, tmp_path: Path, refusal: Refusal) -> None:
    base = toys.base(refusal.base)
    name = f"refused-{refusal.name}".replace(" ", "_")
    adapter = toys.adapter(name, base, dict(refusal.config))
    if refusal.by_hand:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(refusal.by_hand)))
    with pytest.raises(lorafast.LorafastError) as caught:
        lorafast.merge(base, adapter, tmp_path / "out")
    assert refusal.says.lower() in str(caught.value).lower()
    assert not (tmp_path / "out").exists()
