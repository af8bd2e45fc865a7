"""What PEFT makes of the factors, under its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.analysis import random_factors, write_factors
from support.dense_methods import MODULE, toy, toys, truncated, written

X, Y = toy("X"), toy("Y")


def test_linear_has_the_cross_terms_of_the_reference(tmp_path: Path) -> None:
    paths = toys(tmp_path, "XY")
    asked: dict[str, Any] = {"compat": "peft", "dtype": "float64"}
    report = lorafast.combine(paths, tmp_path / "out", weights=[1, -0.5], **asked)
    found = written(tmp_path / "out")[MODULE]
    expected = [[-2, 4.5, 8], [-1.5, 4, 3.5], [-1, 1, 9], [0.5, -2, 1.5]]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    exact = X - Y / 2
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) == pytest.approx(
        0.527985, abs=1e-6
    )
    assert report.ranks == {MODULE: 2}
    assert report.error < 1e-12
    assert report.modules[MODULE].coefficients is None
    lorafast.combine(paths, tmp_path / "half", weights=[0.5, 0.5], **asked)
    half = written(tmp_path / "half")[MODULE]
    np.testing.assert_allclose(half[0], [5.5355339059, 1.7928932188, 6.8284271247], atol=1e-9)
    exact = (X + Y) / 2
    assert np.linalg.norm(half - exact) / np.linalg.norm(exact) == pytest.approx(0.870448, abs=1e-6)


def test_cat_and_svd_are_the_sum(tmp_path: Path) -> None:
    paths = toys(tmp_path, "XY")
    asked: dict[str, Any] = {"compat": "peft", "dtype": "float64", "weights": [0.5, 0.5]}
    lorafast.combine(paths, tmp_path / "cat", method="cat", **asked)
    np.testing.assert_allclose(written(tmp_path / "cat")[MODULE], (X + Y) / 2, atol=1e-12)
    report = lorafast.combine(paths, tmp_path / "svd", method="svd", **asked)
    expected = truncated((X + Y) / 2, 2)
    np.testing.assert_allclose(written(tmp_path / "svd")[MODULE], expected, atol=1e-9)
    assert report.error == pytest.approx(0.079964, abs=1e-6)


@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune"])
@pytest.mark.parametrize("density", [1.0, 0.6])
@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_results_are_those_of_pefts_functions(tmp_path: Path, method: str, density: float) -> None:
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("peft.utils.merge_utils")
    paths, factors, weights = [], [], [1.0, -0.5, 2.0]
    for index in range(3):
        own = random_factors({"m": (7, 9, 3)}, seed=index)
        paths.append(write_factors(tmp_path / f"in{index}", own, alpha=6.0))
        factors.append(own["m"])
    options = {} if method == "linear" else {"density": density}
    lorafast.combine(
        paths,
        tmp_path / "out",
        method=method,
        weights=weights,
        options=options,
        compat="peft",
        dtype="float64",
    )
    roots = torch.tensor([np.sqrt(abs(2 * w)) for w in weights])
    signs = torch.tensor(weights).sign()
    function = {
        "linear": utils.task_arithmetic,
        "ties": lambda tensors, w: utils.ties(tensors, w, density),
        "magnitude_prune": lambda tensors, w: utils.magnitude_prune(tensors, w, density),
    }[method]
    b = function([torch.from_numpy(b) for b, _ in factors], roots)
    a = function([torch.from_numpy(a) for _, a in factors], roots * signs)
    found = written(tmp_path / "out")["m"]
    np.testing.assert_allclose(found, (b @ a).numpy(), atol=1e-10)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "karcher", "knots"])
def test_what_cannot_be_pefts_is_refused(tmp_path: Path, method: str) -> None:
    with pytest.raises(ValueError, match="there are linear, cat, svd, ties, magnitude_prune"):
        lorafast.combine(toys(tmp_path, "XY"), tmp_path / "out", method=method, compat="peft")


def test_ranks_that_differ_and_other_names_are_refused(tmp_path: Path) -> None:
    paths = [
        write_factors(tmp_path / f"r{rank}", random_factors({"m": (7, 9, rank)})) for rank in (2, 3)
    ]
    with pytest.raises(ValueError, match="m: the ranks are 2 and 3"):
        lorafast.combine(paths, tmp_path / "out", compat="peft")
    with pytest.raises(ValueError, match='compat is "mergekit"; there are "peft"'):
        lorafast.combine(paths, tmp_path / "out", compat="mergekit")
    with pytest.raises(ValueError, match='compat="peft" is for combining'):
        lorafast.resize(paths[0], tmp_path / "out", rank=1, compat="peft")
    with pytest.raises(ValueError, match="cat"):
        lorafast.combine(paths, tmp_path / "out", method="cat")
