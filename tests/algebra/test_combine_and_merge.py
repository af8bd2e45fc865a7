"""A combination that is merged, beside a merge by the strategy of the same name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base

RANK = 4
#: Methods, their options, weights, and whether the result has full rank.
CASES: list[tuple[str, dict[str, Any], list[float] | None, bool]] = [
    ("linear", {}, [1.0, -0.5], False),
    ("normalized", {}, [3.0, 1.0], False),
    ("centroid", {}, None, False),
    ("slerp", {"t": 0.25}, None, False),
    ("nuslerp", {}, [3.0, 1.0], False),
    ("karcher", {}, None, False),
    ("multislerp", {}, None, False),
    ("model_stock", {}, None, False),
    ("projection", {}, None, False),
    ("ties", {"density": 0.5}, [1.0, 0.5], True),
    ("dare_linear", {"density": 0.5}, None, True),
    ("dare_ties", {"density": 0.7}, None, True),
    ("della", {"density": 0.5, "epsilon": 0.2}, None, True),
    ("breadcrumbs", {"density": 0.6, "gamma": 0.1}, None, True),
    ("magnitude_prune", {"density": 0.3}, None, True),
    ("sce", {"select_topk": 0.5}, None, True),
]


@pytest.mark.parametrize(
    ("method", "options", "weights", "is_full"), CASES, ids=[case[0] for case in CASES]
)
def test_the_merged_combination_is_the_merge(
    tmp_path: Path,
    method: Any,
    options: dict[str, Any],
    weights: list[float] | None,
    is_full: bool,
) -> None:
    base = make_base(tmp_path / "base", dtype="F32")
    adapters = [
        make_adapter(tmp_path / str(seed), adapter_tensors(rank=RANK, seed=seed), lora_alpha=8)
        for seed in (1, 2)
    ]
    full = max(min(shape) for shape in MODULES.values())
    lorafast.combine(
        adapters,
        tmp_path / "both",
        method=method,
        options=options,
        weights=weights,
        rank=full if is_full else None,
        seed=7,
    )
    lorafast.merge(base, tmp_path / "both", tmp_path / "one")
    lorafast.merge(
        base,
        adapters,
        tmp_path / "two",
        strategy=method,
        strategy_options=options,
        weights=weights,
        seed=7,
    )
    before = _weights(base)
    one, two = _weights(tmp_path / "one"), _weights(tmp_path / "two")
    changed = [name for name, weight in two.items() if not np.array_equal(weight, before[name])]
    assert len(changed) == len(MODULES)
    for name in changed:
        update = two[name].astype(np.float64) - before[name]
        error = np.linalg.norm(one[name].astype(np.float64) - two[name]) / np.linalg.norm(update)
        # One rounding of the factors in float32, and one of the weights.
        assert error < 2e-6, (name, error)


def _weights(model: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in sorted(model.glob("*.safetensors")):
        found |= load_file(file)
    return found
