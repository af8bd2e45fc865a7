"""A view of a merge has the bytes that the merge writes, whatever is merged and however."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafast
import pytest
from digest_cases import CASES as FIXED
from digest_cases import NORM, Q0, UP0, WIDE, Case
from matrix import FEATURES, Entry, Feature
from support.files import read_checkpoint
from support.fixed_inputs import Adapter, Base, linear, pickle
from support.models import Models
from support.quantised import SCHEMES, Scheme
from support.views import assert_as_written, assert_tensor
from test_matrix import make_adapters
from toys import Toys

MERGES = {name: case for name, case in FIXED.items() if case.subtract is None}
#: A dtype of the base, and one of the adapters.
PAIRS = [("BF16", "F32"), ("F32", "F32"), ("F16", "BF16")]


@pytest.mark.parametrize("name", MERGES)
def test_a_fixed_merge(tmp_path: Path, name: str) -> None:
    case: Case = MERGES[name]
    base = case.base.write(tmp_path / "base")
    adapters = []
    for number, adapter in enumerate(case.adapters):
        adapters.append(adapter.write(tmp_path / f"adapter-{number}"))
        if adapter.pickled:
            pickle(adapters[-1])
    options: Mapping[str, Any] = case.options
    lorafast.merge(base, adapters, tmp_path / "out", report=False, sync=False, **options)
    assert_as_written(read_checkpoint(tmp_path / "out"), base, adapters, **options)


@pytest.mark.parametrize(
    ("feature", "entry", "dtypes"),
    [
        pytest.param(
            feature,
            entry,
            dtypes,
            id=f"{feature.name}-{entry.name}-{'-'.join(dtypes)}".replace(" ", "_"),
            marks=[] if dtypes == PAIRS[0] else [pytest.mark.exhaustive],
        )
        for feature in FEATURES
        for entry in feature.entries
        for dtypes in PAIRS
    ],
)
def test_an_entry_of_the_matrix(
    models: Models, tmp_path: Path, feature: Feature, entry: Entry, dtypes: tuple[str, str]
) -> None:
    toys = Toys(models)
    base = toys.base(entry.base, dtypes[0])
    adapters = make_adapters(toys, feature, entry, dtypes[1])
    lorafast.merge(base, adapters, tmp_path / "out", report=False, sync=False)
    assert_as_written(read_checkpoint(tmp_path / "out"), base, adapters)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_a_swap_on_a_quantised_base(tmp_path: Path, scheme: Scheme) -> None:
    """What is quantised again comes with its scales; what returns to the base, with the base's."""
    base = Base(WIDE | NORM, scheme=scheme).write(tmp_path / "base")
    files = {}
    for name, module in (("one", Q0), ("two", UP0)):
        adapter = Adapter(linear(module, of=WIDE), {"r": 4}).write(tmp_path / name)
        lorafast.merge(base, adapter, tmp_path / f"out-{name}", report=False, sync=False)
        files[name] = read_checkpoint(tmp_path / f"out-{name}")
    with lorafast.open_merged(base, tmp_path / "one") as merged:
        for now, then in (("one", "two"), ("two", "one")):
            swapped = dict(merged.swap(tmp_path / then))
            for name, found in swapped.items():
                assert_tensor(found, files[then][name], name)
            differing = {name for name in files[then] if files[then][name] != files[now][name]}
            assert differing <= swapped.keys()
            assert all(Q0 in name or UP0 in name for name in swapped)
