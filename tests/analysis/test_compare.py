"""Comparisons against dense products, and what must not change them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
import scipy.linalg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lorafast._analysis.names import names_of
from lorafast._report.serialize import from_plain
from support.analysis import Factors, random_factors, write_factors
from support.handmade import make_adapter

SHAPES = {"layers.0.q": (40, 30, 4), "layers.1.q": (26, 50, 3)}


def dense(factors: Factors, scales: dict[str, float] | None = None) -> dict[str, Any]:
    return {
        path: (b @ a) * (1.0 if scales is None else scales[path])
        for path, (b, a) in factors.items()
    }


def cosine(x: dict[str, Any], y: dict[str, Any]) -> float:
    def product(left: dict[str, Any], right: dict[str, Any]) -> float:
        return sum(float(np.sum(left[p] * right[p])) for p in left.keys() & right.keys())

    return product(x, y) / math.sqrt(product(x, x) * product(y, y))


def related(seed: int) -> tuple[Factors, Factors]:
    """Two adapters of different ranks that have a direction in common."""
    first = random_factors(SHAPES, seed)
    second = random_factors({p: (m, n, r + 2) for p, (m, n, r) in SHAPES.items()}, seed + 1)
    for path, (b, a) in second.items():
        b[:, 0] = 4 * first[path][0][:, 1]
        a[0] = first[path][1][1]
    return first, second


def test_figures_are_those_of_the_dense_updates(tmp_path: Path) -> None:
    factors = related(0)
    paths = [
        write_factors(tmp_path / "one", factors[0]),
        write_factors(tmp_path / "two", factors[1], alpha=6.0),
    ]
    scales = {path: 6.0 / (shape[2] + 2) for path, shape in SHAPES.items()}
    x, y = dense(factors[0]), dense(factors[1], scales)
    comparison = lorafast.compare(paths)
    assert comparison.names == ["one", "two"]
    assert comparison.cosine[0, 1] == comparison.cosine[1, 0]
    assert comparison.cosine[0, 1] == pytest.approx(cosine(x, y), rel=1e-12)
    assert comparison.cosine.diagonal().tolist() == [1.0, 1.0]
    for path, module in comparison.modules.items():
        left, right = x[path], y[path]
        (pair,) = module.pairs
        assert module.cosine[0, 1] == pytest.approx(cosine({0: left}, {0: right}), rel=1e-12)
        norms = [np.linalg.norm(left), np.linalg.norm(right)]
        assert module.norms == pytest.approx(norms, rel=1e-12)
        assert module.ranks == [SHAPES[path][2], SHAPES[path][2] + 2]
        difference = np.linalg.norm(left - right) / max(norms)
        assert pair.relative_difference == pytest.approx(difference, rel=1e-12)
        agree = np.mean(np.sign(left) == np.sign(right))
        assert not pair.sign_sampled
        assert pair.sign_agreement == pytest.approx(agree, abs=1e-12)
        bases = [np.linalg.svd(value, full_matrices=False) for value in (left, right)]
        sides = [(b[0], b[2].T) for b in bases]
        grids = ((pair.output_phi, pair.output_angles), (pair.input_phi, pair.input_angles))
        for side, (phi, angles) in enumerate(grids):
            u, v = (sides[k][side][:, : module.ranks[k]] for k in (0, 1))  # type: ignore[index]  # both adapters have it
            for i, row in zip(pair.sizes[0], phi, strict=True):
                for j, value in zip(pair.sizes[1], row, strict=True):
                    overlap = np.sum((u[:, :i].T @ v[:, :j]) ** 2) / min(i, j)
                    assert value == pytest.approx(overlap, rel=1e-9)
            expected = np.sort(scipy.linalg.subspace_angles(u, v))
            # SciPy sees angles near zero to no more than 1e-8.
            np.testing.assert_allclose(angles, expected, atol=1e-7)
        for sizes, rank in zip(pair.sizes, module.ranks, strict=True):
            assert sizes == sorted({1, 2, 4, rank} - {size for size in (1, 2, 4) if size > rank})
        assert pair.output_expected[-1][-1] == max(pair.sizes[0][-1], pair.sizes[1][-1]) / len(left)
        assert module.subspace[0, 1] == pair.output_phi[-1][-1]


def test_modules_that_only_some_have_are_named(tmp_path: Path) -> None:
    shapes = SHAPES | {"layers.9.q": (8, 6, 2)}
    paths = [
        write_factors(tmp_path / "one", random_factors(SHAPES, 1)),
        write_factors(tmp_path / "two", random_factors(shapes, 2)),
    ]
    comparison = lorafast.compare(paths)
    assert comparison.only_in == {"one": [], "two": ["layers.9.q"]}
    lone = comparison.modules["layers.9.q"]
    assert lone.present == [False, True]
    assert lone.norms[0] is None
    assert lone.ranks == [None, 2]
    assert np.isnan(lone.cosine[0]).all()
    assert lone.cosine[1, 1] == 1.0
    assert [f.kind for f in comparison.findings] == ["different_modules"]
    assert "layers.9.q" in comparison.to_markdown()
    # What only one has is part of its norm.
    x, y = dense(random_factors(SHAPES, 1)), dense(random_factors(shapes, 2))
    assert comparison.cosine[0, 1] == pytest.approx(cosine(x, y), rel=1e-12)


def test_duplicates_and_opposites_are_found(tmp_path: Path) -> None:
    factors = random_factors(SHAPES, 3)
    paths = [
        write_factors(tmp_path / "one", factors, alpha=8.0),
        write_factors(tmp_path / "same", factors, alpha=2.0),
        write_factors(tmp_path / "minus", factors, alpha=-1.0),
    ]
    comparison = lorafast.compare(paths)
    kinds = [finding.kind for finding in comparison.findings]
    assert kinds == ["duplicate", "opposite", "opposite"]
    np.testing.assert_allclose(np.sign(comparison.cosine), [[1, 1, -1], [1, 1, -1], [-1, -1, 1]])


def test_updates_of_other_shapes_cannot_be_compared(tmp_path: Path) -> None:
    one = write_factors(tmp_path / "one", random_factors({"q": (8, 6, 2)}))
    two = write_factors(tmp_path / "two", random_factors({"q": (8, 7, 2)}))
    comparison = lorafast.compare([one, two])
    assert math.isnan(comparison.cosine[0, 1])
    (finding,) = comparison.findings
    assert finding.kind == "unmeasured"
    assert "[8, 7]" in finding.reason
    assert comparison.modules["q"].pairs == []


def test_an_untrained_adapter_has_no_direction(tmp_path: Path) -> None:
    factors = random_factors(SHAPES, 4)
    zero = {path: (0 * b, a) for path, (b, a) in factors.items()}
    paths = [write_factors(tmp_path / "a", factors), write_factors(tmp_path / "b", zero)]
    comparison = lorafast.compare(paths)
    assert math.isnan(comparison.cosine[0, 1])
    assert math.isnan(comparison.cosine[1, 1])
    assert "untrained" in {f.kind for f in comparison.analyses[1].findings}
    assert "never" not in comparison.to_json()
    assert "**critical**" in comparison.to_markdown()


def test_names_tell_adapters_apart(tmp_path: Path) -> None:
    paths = [
        make_adapter(tmp_path / run / "checkpoint-5") for run in ("run-1", "run-2", "run-1/deep")
    ]
    (first, second, third) = names_of(paths)
    assert (first, second, third) == (
        "run-1_checkpoint-5",
        "run-2_checkpoint-5",
        "deep_checkpoint-5",
    )
    assert names_of([paths[0], paths[0]]) == ["checkpoint-5", "checkpoint-5_2"]
    assert names_of([paths[0] / "adapter_model.safetensors"]) == ["checkpoint-5"]
    assert names_of(["owner/style", "other/style", "other/tone"]) == [
        "owner_style",
        "other_style",
        "tone",
    ]


def test_names_are_those_of_the_paths_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (make_adapter(tmp_path / "runs" / name) for name in ("one", "two"))
    link = tmp_path / "other"
    link.symlink_to(first, target_is_directory=True)
    (tmp_path / "linked").symlink_to(tmp_path / "runs", target_is_directory=True)
    below = tmp_path / "linked" / "two"
    assert names_of([link, second]) == ["other", "two"]
    assert names_of([below, second, link]) == ["linked_two", "runs_two", "other"]
    assert names_of([link / "adapter_model.safetensors"]) == ["other"]
    (tmp_path / "style.safetensors").symlink_to(first / "adapter_model.safetensors")
    assert names_of([tmp_path / "style.safetensors", first]) == ["style", "one"]
    monkeypatch.chdir(first)
    assert names_of([".", "../two", f"{first}/", "../two/."]) == ["one", "two", "one_2", "two_2"]


def test_bad_arguments(tmp_path: Path) -> None:
    path = make_adapter(tmp_path / "a")
    for adapters, names, message in (
        ([path], None, "two adapters"),
        (path, None, "sequence"),
        ([path, path], ["x"], "1 names"),
        ([path, path], ["x", "x"], "not distinct"),
    ):
        with pytest.raises(ValueError, match=message):
            lorafast.compare(adapters, names=names)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(FileNotFoundError):
        lorafast.compare([path, tmp_path / "absent"])


def test_everything_survives_json(tmp_path: Path) -> None:
    paths = [write_factors(tmp_path / str(i), factors) for i, factors in enumerate(related(5))]
    comparison = lorafast.compare(paths, names=["x", "y"])
    plain = json.loads(comparison.to_json(), parse_constant=pytest.fail)
    assert plain["kind"] == "comparison"
    again = from_plain(plain)
    assert isinstance(again, lorafast.Comparison)
    assert again.to_json() == comparison.to_json()
    assert repr(comparison).startswith("<Comparison of 2 adapters ('x', 'y'): 2 modules")
    assert len(comparison.to_markdown().splitlines()) < 200


def test_a_table_has_a_row_for_each_module(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    paths = [write_factors(tmp_path / str(i), factors) for i, factors in enumerate(related(6))]
    comparison = lorafast.compare(paths)
    frame = comparison.to_pandas()
    assert frame["path"].tolist() == list(SHAPES)
    assert frame["second_rank"].tolist() == [6, 5]
    assert frame["cosine"].tolist() == [m.cosine[0, 1] for m in comparison.modules.values()]
    apart = comparison.to_pandas("modules")
    assert apart["path"].tolist() == [path for path in SHAPES for _ in paths]
    assert apart["adapter"].tolist() == comparison.names * len(SHAPES)


# Properties

SETTINGS = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[], Path]:
    """A new directory for each example."""
    count = iter(range(10_000))
    return lambda: tmp_path / str(next(count))


def close(x: lorafast.ModuleAnalysis, y: lorafast.ModuleAnalysis, rel: float) -> None:
    np.testing.assert_allclose(x.singular_values, y.singular_values, rtol=rel)
    for name in ("frobenius_norm", "stable_rank", "effective_rank", "energy_effective_rank"):
        assert getattr(x, name) == pytest.approx(getattr(y, name), rel=rel), name
    assert x.participation_ratio == pytest.approx(y.participation_ratio, rel=rel)
    assert (x.k90, x.k95, x.k99) == (y.k90, y.k95, y.k99)
    assert x.entry_mean == pytest.approx(y.entry_mean, rel=1e-6, abs=1e-12 * y.spectral_norm)


@SETTINGS
@given(seed=SEEDS)
def test_gauge(folder: Callable[[], Path], seed: int) -> None:
    """(BG, G⁻¹A) is the same update as (B, A), alone and compared with others."""
    factors, other = related(seed)
    random = np.random.default_rng(seed)
    turned = {}
    for path, (b, a) in factors.items():
        gauge = random.normal(size=(b.shape[1], b.shape[1])) + 3 * np.eye(b.shape[1])
        turned[path] = (b @ gauge, np.linalg.solve(gauge, a))
    one, two, three = (write_factors(folder(), f) for f in (factors, turned, other))
    comparison = lorafast.compare([one, two, three], names=["one", "turned", "other"])
    for path in SHAPES:
        close(*(comparison.analyses[i].modules[path] for i in (0, 1)), rel=1e-8)
        module = comparison.modules[path]
        assert module.pairs[0].relative_difference < 1e-9
        assert module.cosine[0, 1] == pytest.approx(1, rel=1e-9)
        assert module.cosine[0, 2] == pytest.approx(module.cosine[1, 2], rel=1e-7, abs=1e-10)
        assert module.subspace[0, 2] == pytest.approx(module.subspace[1, 2], rel=1e-7)
        assert max(module.pairs[0].output_angles) < 1e-6


@SETTINGS
@given(seed=SEEDS, alpha=st.floats(0.01, 100), share=st.floats(0, 1))
def test_alpha_may_be_baked_into_the_factors(
    folder: Callable[[], Path], seed: int, alpha: float, share: float
) -> None:
    factors = random_factors(SHAPES, seed)
    baked = {}
    for path, (b, a) in factors.items():
        scale = alpha / b.shape[1]
        baked[path] = (b * scale**share, a * scale ** (1 - share))
    one = lorafast.analyze(write_factors(folder(), factors, alpha=alpha))
    two = lorafast.analyze(write_factors(folder(), baked))
    for path in SHAPES:
        close(one.modules[path], two.modules[path], rel=1e-10)


@SETTINGS
@given(
    seed=SEEDS,
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12)),
)
def test_factored_is_dense(
    folder: Callable[[], Path], seed: int, shape: tuple[int, int, int]
) -> None:
    """Whatever the shape, ranks above the weight's extents included."""
    factors = random_factors({"q": shape}, seed)
    record = lorafast.analyze(write_factors(folder(), factors)).modules["q"]
    expected = scipy.linalg.svdvals(dense(factors)["q"])[: min(shape)]
    np.testing.assert_allclose(
        record.singular_values, expected, rtol=1e-8, atol=1e-12 * expected[0]
    )
    assert record.frobenius_norm == pytest.approx(np.linalg.norm(expected), rel=1e-12)


@SETTINGS
@given(seed=SEEDS, order=st.permutations(range(3)))
def test_order_of_adapters_and_modules(
    folder: Callable[[], Path], seed: int, order: list[int]
) -> None:
    adapters = [*related(seed), random_factors(SHAPES, seed + 7)]
    paths = [write_factors(folder(), factors) for factors in adapters]
    backwards = [
        write_factors(folder(), dict(reversed(list(factors.items())))) for factors in adapters
    ]
    names = ["x", "y", "z"]
    straight = lorafast.compare(paths, names=names)
    mixed = lorafast.compare([backwards[i] for i in order], names=[names[i] for i in order])
    grid = np.ix_(order, order)
    np.testing.assert_allclose(mixed.cosine, straight.cosine[grid], rtol=1e-10, atol=1e-14)
    for path, module in mixed.modules.items():
        expected = straight.modules[path]
        np.testing.assert_allclose(module.cosine, expected.cosine[grid], rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(module.subspace, expected.subspace[grid], rtol=1e-9)
        np.testing.assert_array_equal(module.sign_agreement, expected.sign_agreement[grid])


@SETTINGS
@given(seed=SEEDS, threads=st.integers(2, 7))
def test_number_of_threads(folder: Callable[[], Path], seed: int, threads: int) -> None:
    """The same bits."""
    paths = [write_factors(folder(), factors) for factors in related(seed)]
    one = lorafast.compare(paths, threads=1).to_json()
    assert lorafast.compare(paths, threads=threads).to_json() == one
    single = lorafast.analyze(paths[0], entries=True, threads=1)
    assert lorafast.analyze(paths[0], entries=True, threads=threads) == single


@SETTINGS
@given(seed=SEEDS, factor=st.floats(-50, 50).filter(lambda f: abs(f) > 1e-3))
def test_a_multiple_has_the_cosine_of_its_sign(
    folder: Callable[[], Path], seed: int, factor: float
) -> None:
    factors = random_factors(SHAPES, seed)
    scaled = {path: (b * factor, a) for path, (b, a) in factors.items()}
    paths = [write_factors(folder(), f) for f in (factors, scaled)]
    comparison = lorafast.compare(paths)
    assert comparison.cosine[0, 1] == pytest.approx(math.copysign(1, factor), rel=1e-12)
