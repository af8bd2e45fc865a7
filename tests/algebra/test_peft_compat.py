"""What PEFT makes of the factors, under its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.analysis import Array, random_factors, write_factors
from support.dense_methods import MODULE, toy, toys, truncated, uniform, written

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


RAW = ["linear", "ties", "magnitude_prune", "dare_linear", "dare_ties"]
SVD = ["ties_svd", "magnitude_prune_svd", "dare_linear_svd", "dare_ties_svd"]
WEIGHTS = [1.0, -0.5, 2.0]


def adapters(folder: Path) -> tuple[list[Path], list[tuple[Array, Array]]]:
    """Three adapters of one module, of scale 2."""
    paths, factors = [], []
    for index in range(3):
        own = random_factors({"m": (7, 9, 3)}, seed=index)
        paths.append(write_factors(folder / f"in{index}", own, alpha=6.0))
        factors.append(own["m"])
    return paths, factors


def of_peft(monkeypatch: pytest.MonkeyPatch, method: str, density: float) -> Any:
    """PEFT's function of that name, of tensors, weights, and the module that masks are those of."""
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("peft.utils.merge_utils")
    if method == "linear":
        return lambda tensors, weights, _: utils.task_arithmetic(tensors, weights)

    def function(tensors: Any, weights: Any, module: str) -> Any:
        ordinals = iter(range(len(tensors)))

        def pruned(tensor: Any, density: float, rescale: bool) -> Any:
            numbers = uniform(4, module, next(ordinals), tuple(tensor.shape))
            kept = tensor * torch.from_numpy(numbers < density)
            return kept / density if rescale else kept

        monkeypatch.setattr(utils, "random_pruning", pruned)
        return getattr(utils, method)(tensors, weights, density)

    return function


@pytest.mark.parametrize("method", RAW)
@pytest.mark.parametrize("density", [1.0, 0.6])
@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_results_are_those_of_pefts_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any, density: float
) -> None:
    torch = pytest.importorskip("torch")
    paths, factors = adapters(tmp_path)
    options = {} if method == "linear" else {"density": density}
    lorafast.combine(
        paths,
        tmp_path / "out",
        method=method,
        weights=WEIGHTS,
        options=options,
        compat="peft",
        dtype="float64",
        seed=4,
    )
    roots = torch.tensor([np.sqrt(abs(2 * w)) for w in WEIGHTS])
    signs = torch.tensor(WEIGHTS).sign()
    function = of_peft(monkeypatch, method, density)
    b = function([torch.from_numpy(b) for b, _ in factors], roots, "m.B")
    a = function([torch.from_numpy(a) for _, a in factors], roots * signs, "m.A")
    found = written(tmp_path / "out")["m"]
    np.testing.assert_allclose(found, (b @ a).numpy(), atol=1e-10)


@pytest.mark.parametrize("method", SVD)
def test_names_with_svd_are_pefts_functions_of_the_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    torch = pytest.importorskip("torch")
    paths, factors = adapters(tmp_path)
    function = of_peft(monkeypatch, method.removesuffix("_svd"), 0.6)
    deltas = [torch.from_numpy(2 * b @ a) for b, a in factors]
    whole = function(deltas, torch.tensor(WEIGHTS), "m").numpy()
    asked: dict[str, Any] = {
        "method": method,
        "weights": WEIGHTS,
        "options": {"density": 0.6},
        "compat": "peft",
        "seed": 4,
    }
    report = lorafast.combine(paths, tmp_path / "out", **asked)
    assert report.ranks == {"m": 3}
    found = written(tmp_path / "out")["m"]
    np.testing.assert_allclose(found, truncated(whole, 3), atol=1e-5)
    lorafast.combine(paths, tmp_path / "all", rank=7, **asked)
    np.testing.assert_allclose(written(tmp_path / "all")["m"], whole, atol=1e-5)


@pytest.mark.parametrize("method", SVD)
def test_names_with_svd_are_the_methods_cut_to_a_rank(tmp_path: Path, method: Any) -> None:
    paths, _ = adapters(tmp_path)
    asked: dict[str, Any] = {"weights": WEIGHTS, "options": {"density": 0.6}, "seed": 4}
    lorafast.combine(paths, tmp_path / "out", method=method, **asked)
    own = method.removesuffix("_svd")
    lorafast.combine(paths, tmp_path / "own", method=own, rank=3, **asked)
    one, two = (written(tmp_path / name)["m"] for name in ("out", "own"))
    np.testing.assert_array_equal(one, two)
    lorafast.combine(paths, tmp_path / "four", method=method, rank=4, **asked)
    assert np.linalg.matrix_rank(written(tmp_path / "four")["m"], tol=1e-4) == 4


def test_cat_is_the_sum(tmp_path: Path) -> None:
    paths, factors = adapters(tmp_path)
    report = lorafast.combine(paths, tmp_path / "out", method="cat", weights=WEIGHTS)
    assert report.ranks == {"m": 9}
    expected = sum(2 * w * b @ a for w, (b, a) in zip(WEIGHTS, factors, strict=True))
    np.testing.assert_allclose(written(tmp_path / "out")["m"], expected, atol=1e-5)


def test_random_masks_of_factors_depend_on_the_seed_and_keep_the_mean(tmp_path: Path) -> None:
    own = {"m": (np.ones((40, 2)), np.ones((2, 50)))}
    path = write_factors(tmp_path / "in", own, alpha=2.0)
    asked: dict[str, Any] = {
        "method": "dare_linear",
        "weights": [0.5, 0.5],
        "options": {"density": 0.25},
        "compat": "peft",
    }
    means = []
    for seed in range(40):
        lorafast.combine([path, path], tmp_path / "out", seed=seed, overwrite=True, **asked)
        means.append(written(tmp_path / "out")["m"].mean())
    assert len(set(means)) == 40
    # Factors are √½ times two, so that products are 2·(√½·2)²: with cross terms, twice the update.
    assert np.mean(means) == pytest.approx(4, rel=0.1)


def test_of_one_adapter_pefts_methods_make_a_multiple(tmp_path: Path) -> None:
    paths, factors = adapters(tmp_path)
    asked: dict[str, Any] = {"options": {"density": 0.3}, "weights": [-0.5], "compat": "peft"}
    lorafast.combine(paths[:1], tmp_path / "out", method="ties", **asked)
    b, a = factors[0]
    np.testing.assert_allclose(written(tmp_path / "out")["m"], -b @ a, atol=1e-5)


@pytest.mark.parametrize("method", ["karcher", "knots", "della"])
def test_what_cannot_be_pefts_is_refused(tmp_path: Path, method: Any) -> None:
    with pytest.raises(ValueError, match="there are PEFT's: linear, cat, svd, ties, ties_svd"):
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
    given: dict[str, Any] = {"method": "ties", "options": {"normalize": False}}
    with pytest.raises(ValueError, match='takes no option "normalize"'):
        lorafast.combine(paths, tmp_path / "out", compat="peft", **given)
