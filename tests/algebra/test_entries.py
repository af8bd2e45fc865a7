"""Entry-wise methods as adapters: what they make, and what an adapter's rank keeps of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.analysis import Array, random_factors, write_factors
from support.dense_methods import (
    MODULE,
    breadcrumbs,
    dare,
    della,
    elected,
    largest,
    sce,
    ties,
    toy,
    toys,
    truncated,
    uniform,
    written,
)

P, Q = toy("P"), toy("Q")


def combined(paths: Sequence[Path], output: Path, **asked: Any) -> Array:
    lorafast.combine(paths, output, dtype="float64", rank=3, **asked)
    return written(output)[MODULE]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (
            {"method": "ties"},
            [[-14, 0, 0], [20, -18, -14], [-13, 0, 0], [29 / 2, 28, -15]],
        ),
        (
            {"method": "ties", "options": {"normalize": False}},
            [[-14, 0, 0], [20, -36, -28], [-26, 0, 0], [29, 28, -15]],
        ),
        (
            {"method": "ties", "weights": [0.25, 1.0]},
            [[-14, 0, 0], [20, -78 / 5, -82 / 5], [-13, 0, 0], [16, 28, -15]],
        ),
        # Q's values count with the sign that their weight gives them.
        (
            {"method": "ties", "weights": [1.0, -0.5]},
            [[-14, 0, 0], [-20, -22, -10], [-13, 0, 0], [12, 28, 15]],
        ),
        (
            {"method": "magnitude_prune", "weights": [1.0, -0.5]},
            [[-14, 0, 0], [-10, -15, -1], [-6.5, 0, 0], [3.5, 28, 7.5]],
        ),
        (
            {"method": "sce", "options": {"select_topk": 0.5}},
            [[-9.5174206968, 10, 0], [20, 0, 0], [0, 0, 0], [0, 28, -15]],
        ),
    ],
)
def test_the_reference_of_two_toys(tmp_path: Path, asked: dict[str, Any], expected: Any) -> None:
    options = {"density": 0.5} if asked["method"] != "sce" else {}
    options |= asked.get("options", {})
    found = combined(toys(tmp_path, "PQ"), tmp_path / "out", **(asked | {"options": options}))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_breadcrumbs_and_sce_of_the_toys(tmp_path: Path) -> None:
    found = combined(
        toys(tmp_path, "P"),
        tmp_path / "crumbs",
        method="breadcrumbs",
        options={"density": 0.5, "gamma": 0.25},
    )
    np.testing.assert_allclose(found, [[0, 0, 9], [0, 0, -10], [-13, 0, 6], [12, 0, 8]], atol=1e-5)
    found = combined(toys(tmp_path / "all", "PQ"), tmp_path / "sce", method="sce")
    np.testing.assert_allclose(found[0], [-9.174963036, 10, 7.552488911], atol=1e-5)
    np.testing.assert_allclose(found[3], [14.412518483, 28, -15], atol=1e-5)


SHAPES = {"wide": (20, 33, 3), "tall": (41, 12, 2), "model.square": (18, 18, 4)}
WEIGHTS = [1.0, -0.5, 0.75]


def inputs(directory: Path) -> tuple[list[Path], dict[str, list[Array]]]:
    paths, deltas = [], {name: [] for name in SHAPES}
    for index in range(3):
        shapes = {name: (m, n, r + index) for name, (m, n, r) in SHAPES.items()}
        factors = random_factors(shapes, seed=index)
        paths.append(write_factors(directory / f"in{index}", factors))
        for name, (b, a) in factors.items():
            deltas[name].append(b @ a)
    return paths, deltas


def masked(
    function: Callable[..., Array], deltas: Sequence[Array], name: str, *arguments: float
) -> list[Array]:
    return [
        function(delta, *arguments, uniform(11, name, index, delta.shape))
        for index, delta in enumerate(deltas)
    ]


def total(kept: Sequence[Array], weights: Sequence[float]) -> Array:
    return sum((w * x for w, x in zip(weights, kept, strict=True)), np.zeros(1))


CASES: dict[str, tuple[dict[str, Any], Callable[[list[Array], str], Array]]] = {
    "ties": ({"density": 0.3}, lambda d, _: ties(d, WEIGHTS, 0.3)),
    "magnitude_prune": (
        {"density": 0.3},
        lambda d, _: total([largest(x, int(0.3 * x.size)) for x in d], WEIGHTS),
    ),
    "breadcrumbs": (
        {"density": 0.3, "gamma": 0.1},
        lambda d, _: total([breadcrumbs(x, 0.3, 0.1) for x in d], WEIGHTS),
    ),
    "breadcrumbs_ties": (
        {"density": 0.3, "gamma": 0.1},
        lambda d, _: elected([breadcrumbs(x, 0.3, 0.1) for x in d], WEIGHTS),
    ),
    "dare_linear": (
        {"density": 0.4},
        lambda d, name: total(masked(dare, d, name, 0.4), WEIGHTS),
    ),
    "dare_ties": (
        {"density": 0.4, "normalize": False},
        lambda d, name: elected(masked(dare, d, name, 0.4), WEIGHTS, False),
    ),
    "della": (
        {"density": 0.5, "epsilon": 0.2},
        lambda d, name: elected(masked(della, d, name, 0.5, 0.2), WEIGHTS),
    ),
    "della_linear": (
        {"density": 0.5, "epsilon": 0.2},
        lambda d, name: total(masked(della, d, name, 0.5, 0.2), WEIGHTS),
    ),
    "sce": ({"select_topk": 0.6}, lambda d, _: sce(d, 0.6)),
}


@pytest.mark.parametrize("method", CASES)
def test_all_methods_are_their_dense_definitions(tmp_path: Path, method: str) -> None:
    paths, deltas = inputs(tmp_path)
    options, reference = CASES[method]
    asked: dict[str, Any] = {"method": method, "options": options, "seed": 11, "dtype": "float64"}
    if method != "sce":
        asked["weights"] = WEIGHTS
    full = lorafast.combine(paths, tmp_path / "full", rank=100, **asked)
    cut = lorafast.combine(paths, tmp_path / "cut", rank=5, **asked)
    whole, short = written(tmp_path / "full"), written(tmp_path / "cut")
    for name, each in deltas.items():
        expected = reference(each, name)
        norm = np.linalg.norm(expected)
        # The result of one module is in float32.
        assert np.abs(whole[name] - expected).max() < 3e-6 * np.abs(expected).max()
        assert full.modules[name].error < 1e-12
        best = np.linalg.norm(expected - truncated(expected, 5)) / norm
        own = np.linalg.norm(expected - short[name]) / norm
        record = cut.modules[name]
        assert record.rank == 5
        assert own == pytest.approx(best, rel=1e-6)
        assert record.error == pytest.approx(own, rel=1e-6)
        assert record.norm == pytest.approx(norm, rel=1e-6)
        assert 1 - record.kept == pytest.approx(best**2, rel=1e-5)
    squares = [(record.error * record.norm) ** 2 for record in cut.modules.values()]
    norms = [record.norm**2 for record in cut.modules.values()]
    assert cut.error == pytest.approx(np.sqrt(sum(squares) / sum(norms)), rel=1e-12)


def test_a_module_that_adapters_lack_counts_as_zero(tmp_path: Path) -> None:
    one = random_factors({"m": (9, 8, 2), "n": (7, 7, 2)}, seed=1)
    two = random_factors({"m": (9, 8, 2)}, seed=2)
    paths = [write_factors(tmp_path / "one", one), write_factors(tmp_path / "two", two)]
    deltas = [b @ a for b, a in one.values()]
    for method in ("ties", "sce", "dare_linear"):
        output = tmp_path / method
        options = {"select_topk" if method == "sce" else "density": 0.5}
        lorafast.combine(
            paths[::-1], output, method=method, options=options, rank=9, dtype="float64", seed=3
        )
        found = written(output)["n"]
        zero = np.zeros((7, 7))
        # The second in the list has the module: its masks are those of the ordinal 1.
        expected = {
            "ties": lambda zero=zero: ties([zero, deltas[1]], [1, 1], 0.5),
            "sce": lambda zero=zero: sce([zero, deltas[1]], 0.5),
            "dare_linear": lambda: dare(deltas[1], 0.5, uniform(3, "n", 1, (7, 7))),
        }[method]()
        assert np.abs(found - expected).max() < 3e-6 * np.abs(expected).max()


def large(directory: Path) -> list[Path]:
    """Two unrelated updates, of a size of which not all singular values are found."""
    return [
        write_factors(directory / f"in{index}", random_factors({"m": (300, 260, 8)}, seed=index))
        for index in range(2)
    ]


def test_the_truncation_of_a_large_module_is_as_good_as_the_best(tmp_path: Path) -> None:
    paths = large(tmp_path)
    deltas = [delta for path in paths for delta in written(path).values()]
    expected = ties(deltas, [1.0, 1.0], 0.5)
    values = np.linalg.svd(expected, compute_uv=False)
    energy = np.cumsum(values**2) / (values**2).sum()
    report = lorafast.combine(
        paths, tmp_path / "out", method="ties", options={"density": 0.5}, rank=16, dtype="float64"
    )
    record = report.modules["m"]
    best = np.sqrt(1 - energy[15])
    assert 0.3 < best < 0.9
    assert best * (1 - 1e-6) <= record.error < best * 1.001
    found = written(tmp_path / "out")["m"]
    own = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert record.error == pytest.approx(own, rel=1e-6)
    np.testing.assert_allclose(record.singular_values, values[:16], rtol=1e-2)


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        ("energy:0.5", lambda s: np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.5) + 1),
        ("energy:0.9", lambda s: np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.9) + 1),
        ("error:0.6", lambda s: np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 1 - 0.36) + 1),
        ("sv_ratio:3", lambda s: (s > s[0] / 3).sum()),
        ("sv_cumulative:0.4", lambda s: np.searchsorted(np.cumsum(s) / s.sum(), 0.4) + 1),
        ("budget:ranks=40", lambda s: 40),
    ],
)
def test_rules_find_the_rank(tmp_path: Path, rule: str, reference: Any) -> None:
    paths = large(tmp_path)
    deltas = [delta for path in paths for delta in written(path).values()]
    values = np.linalg.svd(ties(deltas, [1.0, 1.0], 0.5), compute_uv=False)
    report = lorafast.combine(
        paths, tmp_path / "out", method="ties", options={"density": 0.5}, rank=rule, dry_run=True
    )
    # Triplets that are nearly the leading ones may take one more.
    assert 0 <= report.ranks["m"] - reference(values) <= 1


def test_threads_and_other_modules_do_not_matter(tmp_path: Path) -> None:
    paths = large(tmp_path)
    asked: dict[str, Any] = {"method": "dare_ties", "options": {"density": 0.5}, "rank": 9}
    texts = []
    for threads in (1, 3):
        output = tmp_path / f"out{threads}"
        lorafast.combine(paths, output, threads=threads, seed=5, **asked)
        texts.append((output / "adapter_model.safetensors").read_bytes())
    assert texts[0] == texts[1]
    lorafast.combine(paths, tmp_path / "other", seed=6, **asked)
    assert (tmp_path / "other/adapter_model.safetensors").read_bytes() != texts[0]


@pytest.mark.parametrize("method", [name for name in CASES if not name.startswith("d")])
def test_order_and_gauge_do_not_matter(tmp_path: Path, method: str) -> None:
    paths, turned = [], []
    for index in range(3):
        b, a = random_factors({"m": (14, 11, 2 + index)}, seed=index)["m"]
        paths.append(write_factors(tmp_path / f"in{index}", {"m": (b, a)}))
        # Powers of two leave all bits of the product.
        turned.append(write_factors(tmp_path / f"turned{index}", {"m": (b * 8, a / 8)}))
    asked: dict[str, Any] = {"method": method, "rank": 11, "dtype": "float64"}
    asked["options"] = CASES[method][0]
    weights = None if method == "sce" else WEIGHTS
    lorafast.combine(paths, tmp_path / "one", weights=weights, **asked)
    other = None if weights is None else weights[::-1]
    lorafast.combine(turned[::-1], tmp_path / "two", weights=other, **asked)
    one, two = written(tmp_path / "one")["m"], written(tmp_path / "two")["m"]
    assert np.abs(one - two).max() < 1e-6 * np.abs(one).max()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rank": None}, "makes updates of full rank.*give a rank.*strategy ties"),
        ({"rank": "auto"}, 'rank is "auto"'),
        ({"options": {"density": 0}}, "density is 0"),
        ({"options": {"density": 1.5}}, "density is 1.5"),
        ({"options": {"epsilon": 0.1}}, 'ties takes no option "epsilon"'),
        ({"method": "della", "options": {"density": 0.1}}, "density 0.1 and epsilon 0.15"),
        ({"method": "sce", "weights": [1, 2]}, "sce takes no weights"),
        ({"method": "breadcrumbs", "options": {"gamma": 1}}, "gamma is 1"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lorafast.combine(
            toys(tmp_path, "PQ"), tmp_path / "out", **({"method": "ties", "rank": 2} | asked)
        )
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    b, a = random_factors({"m": (6, 5, 2)})["m"]
    a[1, 2] = np.inf
    path = write_factors(tmp_path / "inf", {"m": (b, a)})
    with pytest.raises(ValueError, match="m has values that are not finite"):
        lorafast.combine([path], tmp_path / "out", method="magnitude_prune", rank=2)
