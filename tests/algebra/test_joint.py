"""Methods that work on singular vectors, against references in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.analysis import Array, random_factors, write_factors
from support.dense_methods import (
    MODULE,
    core_space,
    iso_c,
    knots,
    ties,
    toy,
    toys,
    truncated,
    tsv_m,
    written,
)
from support.files import read_safetensors, tensor
from support.reference import PREFIX

SHAPES = [
    {"wide": (12, 30, 3), "tall": (25, 9, 2), "square": (16, 16, 4)},
    {"wide": (12, 30, 2), "tall": (25, 9, 3), "only": (8, 8, 2)},
    {"wide": (12, 30, 1), "tall": (25, 9, 2), "square": (16, 16, 3)},
]
WEIGHTS = [1.0, -0.5, 0.75]


def adapters(directory: Path) -> tuple[list[Path], list[dict[str, tuple[Array, Array]]]]:
    """Three of mixed ranks, scales and modules: paths, and the factors with the scale in B."""
    paths, all_factors = [], []
    for index, shapes in enumerate(SHAPES):
        factors = random_factors(shapes, seed=index)
        alpha = 2.0 + index
        paths.append(write_factors(directory / f"in{index}", factors, alpha=alpha))
        scaled = {name: (b * alpha / a.shape[0], a) for name, (b, a) in factors.items()}
        all_factors.append(scaled)
    return paths, all_factors


def of_modules(
    all_factors: Sequence[dict[str, tuple[Array, Array]]],
) -> dict[str, list[tuple[Array, Array] | None]]:
    names = {name: None for factors in all_factors for name in factors}
    return {name: [factors.get(name) for factors in all_factors] for name in names}


def close(one: Array, other: Array, error: float = 1e-10) -> None:
    assert np.abs(one - other).max() < error * np.abs(other).max()


def combined(paths: list[Path], output: Path, **asked: Any) -> dict[str, Array]:
    lorafast.combine(paths, output, dtype="float64", **asked)
    return written(output)


def row(matrix: Array, index: int, expected: list[float], error: float = 1e-9) -> None:
    np.testing.assert_allclose(matrix[index], expected, atol=error)


def test_tsv_m_of_the_toys(tmp_path: Path) -> None:
    report = lorafast.combine(
        toys(tmp_path, "ST"), tmp_path / "out", method="tsv_m", dtype="float64"
    )
    found = written(tmp_path / "out")[MODULE]
    record = report.modules[MODULE]
    np.testing.assert_allclose(
        record.singular_values, [9.1651513899, 9.1373615856, 7.3829955475, 6.4807406984], atol=1e-9
    )
    assert record.norm == pytest.approx(16.2480768093, abs=1e-9)
    assert record.error < 1e-12
    assert record.coefficients is None
    row(found, 0, [2.1903628701, 2.4332609797, -0.0887993563, -1.7588770992, -0.8624532443])
    row(found, 5, [0.3695898141, 0.9901677857, 4.2540390137, 6.5035939602, -1.9549282570])


def test_iso_c_of_the_toys(tmp_path: Path) -> None:
    report = lorafast.combine(
        toys(tmp_path, "ST"), tmp_path / "out", method="iso_c", dtype="float64"
    )
    record = report.modules[MODULE]
    np.testing.assert_allclose(record.singular_values, [7.4256216534] * 4, atol=1e-9)
    assert record.norm == pytest.approx(14.8512433069, abs=1e-9)
    found = written(tmp_path / "out")[MODULE]
    row(found, 0, [2.0091735714, 2.8036466355, -0.5127310702, -1.8928809807, -1.0284628765])


def test_knots_with_ties_of_the_toys(tmp_path: Path) -> None:
    # The reference keeps 11 of the 20 coordinates.
    found = combined(
        toys(tmp_path, "ST"), tmp_path / "out", method="knots", options={"density": 0.55}
    )[MODULE]
    assert np.linalg.norm(found) == pytest.approx(14.3187674738, abs=1e-9)
    row(found, 0, [2.5295628733, 3.1270831571, -0.7247112319, -0.8087327629, -1.1232152426])


def test_svd_has_the_largest_rank_of_the_inputs(tmp_path: Path) -> None:
    paths, all_factors = adapters(tmp_path)
    report = lorafast.combine(paths, tmp_path / "out", method="svd", weights=WEIGHTS)
    found = written(tmp_path / "out")
    for name, each in of_modules(all_factors).items():
        present = [(w, f) for w, f in zip(WEIGHTS, each, strict=True) if f is not None]
        rank = max(a.shape[0] for _, (_, a) in present)
        total = sum((w * b @ a for w, (b, a) in present), np.zeros(report.modules[name].shape))
        assert report.ranks[name] == rank
        close(found[name], truncated(total, rank), 1e-6)
        error = np.linalg.norm(found[name] - total) / np.linalg.norm(total)
        assert report.modules[name].error == pytest.approx(error, abs=1e-7)
    cut = lorafast.combine(paths, tmp_path / "cut", method="svd", rank="error:0.2")
    linear = lorafast.combine(paths, tmp_path / "linear", method="linear", rank="error:0.2")
    assert cut.ranks == linear.ranks


@pytest.mark.parametrize("method", ["knots", "core_space", "tsv_m", "iso_c"])
def test_results_are_those_of_dense_references(tmp_path: Path, method: str) -> None:
    paths, all_factors = adapters(tmp_path)
    options = {"density": 0.4} if method in ("knots", "core_space") else None
    report = lorafast.combine(
        paths, tmp_path / "out", method=method, weights=WEIGHTS, options=options, dtype="float64"
    )
    found = written(tmp_path / "out")
    for name, each in of_modules(all_factors).items():
        pairs = [(w, f) for w, f in zip(WEIGHTS, each, strict=True) if f is not None]
        weights = [w for w, _ in pairs]
        factors = [f for _, f in pairs]
        deltas = [b @ a for b, a in factors]

        def merge(blocks: Sequence[Array], weights: list[float] = weights) -> Array:
            return ties(blocks, weights, 0.4)

        expected = {
            "knots": lambda deltas=deltas, merge=merge: knots(deltas, merge),
            "core_space": lambda factors=factors, merge=merge: core_space(factors, merge),
            "tsv_m": lambda deltas=deltas, weights=weights: tsv_m(deltas, weights),
            "iso_c": lambda deltas=deltas, weights=weights: iso_c(
                sum((w * d for w, d in zip(weights, deltas, strict=True)), np.zeros(1))
            ),
        }[method]()
        close(found[name], expected)
        record = report.modules[name]
        assert record.error < 1e-12
        assert record.norm == pytest.approx(np.linalg.norm(expected), rel=1e-10)
        assert record.rank <= record.source_rank
        np.testing.assert_allclose(
            record.singular_values,
            np.linalg.svd(expected, compute_uv=False)[: record.rank],
            rtol=1e-9,
        )


@pytest.mark.parametrize("method", ["knots", "core_space"])
def test_a_sum_in_a_shared_basis_is_the_sum(tmp_path: Path, method: str) -> None:
    paths, _ = adapters(tmp_path)
    linear = combined(paths, tmp_path / "linear", weights=WEIGHTS)
    found = combined(
        paths, tmp_path / "out", method=method, weights=WEIGHTS, options={"merge": "linear"}
    )
    for name, expected in linear.items():
        close(found[name], expected)
    karcher = combined(paths[::2], tmp_path / "karcher", method="karcher")
    merged = combined(paths[::2], tmp_path / "merged", method=method, options={"merge": "karcher"})
    for name, expected in karcher.items():
        close(merged[name], expected)


@pytest.mark.parametrize("method", ["knots", "core_space", "tsv_m", "iso_c"])
def test_a_rank_cuts_the_methods_own_result(tmp_path: Path, method: str) -> None:
    paths, _ = adapters(tmp_path)
    whole = combined(paths, tmp_path / "whole", method=method)
    report = lorafast.combine(paths, tmp_path / "out", method=method, rank=2, dtype="float64")
    found = written(tmp_path / "out")
    for name, exact in whole.items():
        values = np.linalg.svd(exact, compute_uv=False)
        error = np.sqrt((values[2:] ** 2).sum() / (values**2).sum())
        assert report.modules[name].error == pytest.approx(error, rel=1e-9)
        assert np.linalg.norm(found[name] - exact) == pytest.approx(
            error * np.linalg.norm(values), rel=1e-9
        )
    budget = lorafast.combine(paths, tmp_path / "budget", method=method, rank="budget:ranks=9")
    assert sum(budget.ranks.values()) == 9


@pytest.mark.parametrize("method", ["knots", "tsv_m", "iso_c"])
def test_the_gauge_of_the_factors_does_not_matter(tmp_path: Path, method: str) -> None:
    random = np.random.default_rng(7)
    factors = random_factors({"m": (14, 11, 3)}, seed=1)
    b, a = factors["m"]
    turn = random.normal(size=(3, 3))
    other = write_factors(tmp_path / "other", random_factors({"m": (14, 11, 2)}, seed=2))
    plain = write_factors(tmp_path / "plain", factors)
    turned = write_factors(tmp_path / "turned", {"m": (b @ turn, np.linalg.solve(turn, a))})
    options = {"density": 0.5} if method == "knots" else None
    one = combined([plain, other], tmp_path / "one", method=method, options=options)
    two = combined([turned, other], tmp_path / "two", method=method, options=options)
    close(one["m"], two["m"], 1e-9)


@pytest.mark.parametrize("method", ["knots", "core_space", "tsv_m", "iso_c"])
def test_order_and_threads_do_not_matter(tmp_path: Path, method: str) -> None:
    paths, _ = adapters(tmp_path)
    one = combined(paths, tmp_path / "one", method=method, weights=WEIGHTS, threads=1)
    turned = combined(paths[::-1], tmp_path / "turned", method=method, weights=WEIGHTS[::-1])
    for name, expected in one.items():
        close(turned[name], expected, 1e-9)
    lorafast.combine(
        paths, tmp_path / "two", method=method, weights=WEIGHTS, threads=3, dtype="float64"
    )
    bytes_of = [
        (tmp_path / each / "adapter_model.safetensors").read_bytes() for each in ("one", "two")
    ]
    assert bytes_of[0] == bytes_of[1]


def test_lambda_multiplies_and_k_limits(tmp_path: Path) -> None:
    paths = toys(tmp_path, "ST")
    one = combined(paths, tmp_path / "one", method="iso_c")[MODULE]
    twice = combined(paths, tmp_path / "twice", method="iso_c", options={"lambda": -2.0})[MODULE]
    close(twice, -2 * one)
    first = combined(paths, tmp_path / "first", method="tsv_m", options={"k": 1})[MODULE]
    close(first, tsv_m([toy("S"), toy("T")], [1.0, 1.0], k=1))


def test_tsv_m_refuses_directions_that_are_shared(tmp_path: Path) -> None:
    paths = toys(tmp_path, "SST")
    with pytest.raises(ValueError, match=r"q_proj: tsv_m needs.*smallest eigenvalue.*duplicates"):
        lorafast.combine(paths[:2], tmp_path / "out", method="tsv_m")
    with pytest.raises(ValueError, match=r"a 4×3 weight has fewer than the 4"):
        lorafast.combine(toys(tmp_path / "small", "PQ"), tmp_path / "out", method="tsv_m")
    assert not (tmp_path / "out").exists()
    # Without a weight there is no direction.
    found = combined(paths, tmp_path / "out", method="tsv_m", weights=[0.0, 1.0, 1.0])
    close(found[MODULE], tsv_m([toy("S"), toy("T")], [1.0, 1.0]))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "knots", "options": {"merge": "tsv_m"}}, 'merge is "tsv_m"; there are linear'),
        ({"method": "knots", "options": {"k": 1}}, 'takes no option "k"; it takes merge, density'),
        ({"method": "iso_c", "options": {"density": 0.5}}, 'takes no option "density"'),
        ({"method": "tsv_m", "options": {"k": 0}}, "k is 0"),
        ({"method": "core_space", "options": {"density": 0}}, "density is 0"),
        ({"method": "knots", "rank": "auto"}, 'rank is "auto".*turn on a single rounding'),
        ({"method": "wudi"}, "there are linear,.*core_space, ties"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lorafast.combine(toys(tmp_path, "ST"), tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["knots", "core_space", "tsv_m", "iso_c"])
def test_auto_leaves_the_directions_that_rounding_made(tmp_path: Path, method: Any) -> None:
    random = np.random.default_rng(0)
    paths, exact = [], []
    for index in range(2):
        b, a = random_factors({"m": (40, 30, 4)}, seed=index)["m"]
        # Rank 4, written with 7 columns and rounded to 16 bits.
        mix = random.standard_normal((4, 7))
        wide = ((b @ mix).astype(np.float16), (np.linalg.pinv(mix) @ a).astype(np.float16))
        paths.append(write_factors(tmp_path / f"in{index}", {"m": wide}, alpha=7.0))
        exact.append(b @ a)
    asked: dict[str, Any] = {"method": method}
    if method in ("knots", "core_space"):
        asked["options"] = {"merge": "linear"}
    report = lorafast.combine(paths, tmp_path / "out", rank="auto", dtype="float64", **asked)
    assert report.ranks == {"m": 8}
    wanted = {"tsv_m": lambda: tsv_m(exact, [1, 1], 4), "iso_c": lambda: iso8(sum(exact))}
    close(written(tmp_path / "out")["m"], wanted.get(method, lambda: sum(exact))(), 3e-3)
    # Without it the rounding has directions of its own.
    report = lorafast.combine(paths, tmp_path / "all", dtype="float64", **asked)
    assert report.ranks == {"m": 14}


def iso8(total: Any) -> Array:
    u, s, vh = np.linalg.svd(total, full_matrices=False)
    return float(s[:8].mean()) * u[:, :8] @ vh[:8]


@pytest.mark.parametrize("method", ["knots", "core_space", "tsv_m", "iso_c"])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, method: str) -> None:
    b, a = random_factors({"m": (6, 5, 2)})["m"]
    b[3, 1] = np.nan
    paths = [write_factors(tmp_path / "nan", {"m": (b, a)})]
    paths.append(write_factors(tmp_path / "other", random_factors({"m": (6, 5, 2)}, seed=1)))
    with pytest.raises(ValueError, match="m has values that are not finite"):
        lorafast.combine(paths, tmp_path / "out", method=method)


@pytest.mark.parametrize("method", ["knots", "core_space", "tsv_m", "iso_c"])
def test_updates_of_zero_are_left_out(tmp_path: Path, method: str) -> None:
    b, a = random_factors({"m": (6, 5, 2)})["m"]
    other = random_factors({"m": (6, 5, 2), "n": (6, 5, 2)}, seed=1)
    other["n"] = (other["n"][0] * 0, other["n"][1])
    paths = [write_factors(tmp_path / "one", {"m": (b * 0, a)})]
    paths.append(write_factors(tmp_path / "other", other))
    report = lorafast.combine(paths, tmp_path / "out", method=method)
    assert report.ranks == {"m": 2, "n": 0}
    assert list(written(tmp_path / "out")) == ["m"]


def test_biases_of_the_factors_are_summed_and_said(tmp_path: Path) -> None:
    paths, biases = [], []
    for index in range(2):
        bias = np.arange(6.0) + index
        biases.append(bias)
        key = f"{PREFIX}m.lora_B.bias"
        paths.append(
            write_factors(
                tmp_path / f"in{index}",
                random_factors({"m": (6, 5, 2)}, seed=index),
                others={key: tensor(bias, "F64")},
                lora_bias=True,
            )
        )
    asked: dict[str, Any] = {"weights": [1.0, -0.5], "options": {"lambda": 2.0}}
    report = lorafast.combine(
        paths, tmp_path / "out", method="iso_c", dtype="float64", rank=2, **asked
    )
    assert any("biases of the second factors" in note for note in report.notes)
    tensors = read_safetensors(tmp_path / "out/adapter_model.safetensors")
    [found] = [value for name, value in tensors.items() if name.endswith("bias")]
    np.testing.assert_allclose(found.float64(), 2 * (biases[0] - biases[1] / 2), atol=1e-12)
    linear = lorafast.combine(paths, tmp_path / "linear", **asked)
    assert not any("biases" in note for note in linear.notes)
