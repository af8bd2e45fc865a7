"""Mixtures taken apart, and checkpoints put in order."""

from __future__ import annotations

import json
import math
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast import AdapterError, LorafastError
from lorafast._similarity.trajectory import _shortest
from support.analysis import Array, Factors, random_factors, write_factors

SHAPES = {"layers.0.q": (40, 30, 4), "layers.1.q": (26, 50, 3)}


def mixed(parts: list[tuple[float, Factors]]) -> Factors:
    modules = list(dict.fromkeys(module for _, factors in parts for module in factors))
    return {
        module: (
            np.concatenate([w * f[module][0] for w, f in parts if module in f], 1),
            np.concatenate([f[module][1] for _, f in parts if module in f], 0),
        )
        for module in modules
    }


@pytest.fixture
def parts(tmp_path: Path) -> list[Factors]:
    made = [random_factors(SHAPES, seed) for seed in range(4)]
    for name, factors in zip("ABCD", made, strict=True):
        write_factors(tmp_path / name, factors, dtype="F64")
    return made


def dense(factors: Factors) -> Array:
    return np.concatenate([(b @ a).ravel() for b, a in (factors[p] for p in SHAPES)])


def test_a_mixture_is_taken_apart(tmp_path: Path, parts: list[Factors]) -> None:
    write_factors(tmp_path / "mix", mixed([(0.7, parts[0]), (0.3, parts[1])]), dtype="F64")
    found = lorafast.lineage(tmp_path / "mix", [tmp_path / name for name in "ABC"])
    assert list(found.coefficients) == [tmp_path / name for name in "ABC"]
    assert list(found.coefficients.values()) == pytest.approx([0.7, 0.3, 0.0], abs=1e-12)
    assert found.residual < 1e-13
    assert str(found).startswith("0.70·A + 0.30·B, residual ")
    assert found.dependent == {}


def test_the_residual_is_what_none_of_them_has(tmp_path: Path, parts: list[Factors]) -> None:
    target = mixed([(0.7, parts[0]), (-0.2, parts[1]), (0.1, parts[3])])
    write_factors(tmp_path / "mix", target, dtype="F64")
    found = lorafast.lineage(tmp_path / "mix", [tmp_path / name for name in "ABC"])
    columns = np.stack([dense(part) for part in parts[:3]], axis=1)
    expected, residual, *_ = np.linalg.lstsq(columns, dense(target), rcond=None)
    assert list(found.coefficients.values()) == pytest.approx(expected.tolist(), abs=1e-11)
    norm = np.linalg.norm(dense(target))
    assert found.residual == pytest.approx(math.sqrt(residual[0]) / norm, rel=1e-10)
    shares = [w * np.linalg.norm(columns[:, i]) / norm for i, w in enumerate(expected)]
    assert list(found.contributions.values()) == pytest.approx(shares, abs=1e-11)
    assert f"residual {100 * found.residual:.3g} %" in str(found)
    assert " − 0.2" in str(found)
    plain = json.loads(found.to_json())
    assert plain["text"] == str(found)
    assert plain["candidates"][0]["coefficient"] == found.coefficients[tmp_path / "A"]


@pytest.mark.parametrize(("dtype", "bound"), [("F32", 1e-6), ("BF16", 1e-2)])
def test_rounding_is_all_that_is_left(
    tmp_path: Path, parts: list[Factors], dtype: str, bound: float
) -> None:
    write_factors(tmp_path / "mix", mixed([(0.7, parts[0]), (0.3, parts[1])]), dtype=dtype)
    found = lorafast.lineage(tmp_path / "mix", tmp_path)
    assert found.coefficients[tmp_path / "A"] == pytest.approx(0.7, abs=bound)
    assert bound * 1e-3 < found.residual < bound


def test_a_small_residual_keeps_its_digits(tmp_path: Path, parts: list[Factors]) -> None:
    """1e-9 of the norm would drown in ‖T‖² − Σ wᵢ⟨T, Xᵢ⟩."""
    target = mixed([(0.5, parts[0]), (1e-9, parts[3])])
    write_factors(tmp_path / "mix", target, dtype="F64")
    found = lorafast.lineage(tmp_path / "mix", [tmp_path / "A"])
    rest = 1e-9 * dense(parts[3])
    own = dense(parts[0])
    rest -= own * (own @ rest) / (own @ own)
    expected = np.linalg.norm(rest) / np.linalg.norm(dense(target))
    assert found.residual == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16"])
def test_duplicates_among_the_candidates(tmp_path: Path, parts: list[Factors], dtype: str) -> None:
    write_factors(tmp_path / "mix", mixed([(0.7, parts[0]), (0.3, parts[1])]), dtype="F64")
    random = np.random.default_rng(0)
    copy = {}
    for module, (b, a) in parts[0].items():
        gauge = np.linalg.qr(random.normal(size=(b.shape[1],) * 2))[0]
        copy[module] = (2 * b @ gauge, gauge.T @ a)
    write_factors(tmp_path / "A2", copy, dtype=dtype)
    names = ["A", "A2", "B"]
    found = lorafast.lineage(tmp_path / "mix", [tmp_path / name for name in names])
    assert list(found.coefficients.values()) == pytest.approx([0.7, 0.0, 0.3], abs=1e-11)
    assert found.dependent == {tmp_path / "A2": "is 2 times the update of A"}


def test_a_mixture_among_the_candidates(tmp_path: Path, parts: list[Factors]) -> None:
    write_factors(tmp_path / "AB", mixed([(1.0, parts[0]), (1.0, parts[1])]), dtype="F64")
    write_factors(tmp_path / "mix", mixed([(0.7, parts[0]), (0.3, parts[2])]), dtype="F64")
    found = lorafast.lineage(tmp_path / "mix", [tmp_path / name for name in ("A", "B", "AB", "C")])
    assert found.dependent == {tmp_path / "AB": "is a combination of A, B"}
    assert str(found).startswith("0.70·A + 0.30·C")


def test_a_near_neighbour_is_no_duplicate(tmp_path: Path, parts: list[Factors]) -> None:
    """What differs by more than rounding has a weight of its own, and the right one."""
    nudge = {p: (b + 1e-4 * parts[3][p][0], a) for p, (b, a) in parts[0].items()}
    write_factors(tmp_path / "near", nudge, dtype="F64")
    write_factors(tmp_path / "mix", mixed([(0.7, parts[0]), (0.3, nudge)]), dtype="F64")
    found = lorafast.lineage(tmp_path / "mix", [tmp_path / "A", tmp_path / "near"])
    assert found.dependent == {}
    assert list(found.coefficients.values()) == pytest.approx([0.7, 0.3], abs=1e-5)


def test_nothing_in_common(tmp_path: Path, parts: list[Factors]) -> None:
    del parts
    found = lorafast.lineage(tmp_path / "A", [tmp_path / name for name in "BCD"])
    assert found.residual > 0.95
    write_factors(tmp_path / "elsewhere", random_factors({"layers.9.q": (8, 8, 2)}))
    alone = lorafast.lineage(tmp_path / "elsewhere", [tmp_path / "A"])
    assert alone.residual == 1.0
    assert str(alone) == "nothing of these, residual 100 %"


@pytest.mark.parametrize(
    ("share", "related", "text"),
    [
        (0.06, False, "nothing of these, residual 99.8 %"),
        (0.14, False, "nothing of these, residual 99 %"),
        (0.15, True, "0.15·A + something else, residual 98.9 %"),
        (0.8, True, "0.80·A + something else, residual 60 %"),
        (0.9, True, "0.90·A, residual 43.6 %"),
        (-0.9, True, "−0.90·A, residual 43.6 %"),
    ],
)
def test_a_combination_that_explains_next_to_nothing_is_none(
    tmp_path: Path, share: float, related: bool, text: str
) -> None:
    """Orthogonal updates of norm 1, of which the target has a share and a rest."""
    part, rest = ({"q": (np.eye(6)[:, [at]], np.eye(5)[[at]])} for at in (0, 1))
    write_factors(tmp_path / "A", part)
    target = mixed([(share, part), (math.sqrt(1 - share**2), rest)])
    write_factors(tmp_path / "target", target)
    found = lorafast.lineage(tmp_path / "target", [tmp_path / "A"])
    assert str(found) == text
    assert found.related is related
    assert found.explained == pytest.approx(share**2, abs=1e-12)
    # The figures are there in any case.
    assert found.coefficients[tmp_path / "A"] == pytest.approx(share)
    plain = json.loads(found.to_json())
    assert (plain["text"], plain["related"]) == (text, related)


def test_the_target_is_no_candidate_of_its_own(tmp_path: Path, parts: list[Factors]) -> None:
    del parts
    found = lorafast.lineage(tmp_path / "A", tmp_path)
    assert list(found.coefficients) == [tmp_path / name for name in "BCD"]
    with pytest.raises(ValueError, match="no candidate beside the target"):
        lorafast.lineage(tmp_path / "A", tmp_path / "A")
    scanned = lorafast.scan(tmp_path, metrics="headers")
    again = lorafast.lineage(tmp_path / "A", scanned)
    assert again.coefficients == found.coefficients
    assert list(again.names.values()) == ["B", "C", "D"]


def test_zero_candidates_and_targets(tmp_path: Path, parts: list[Factors]) -> None:
    write_factors(tmp_path / "zero", {p: (0 * b, a) for p, (b, a) in parts[0].items()})
    found = lorafast.lineage(tmp_path / "A", [tmp_path / "zero", tmp_path / "B"])
    assert found.coefficients[tmp_path / "zero"] == 0.0
    assert "low-rank update of zero" in found.dependent[tmp_path / "zero"]
    with pytest.raises(AdapterError, match=r"zero: its low-rank update is zero"):
        lorafast.lineage(tmp_path / "zero", [tmp_path / "A"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_candidate_that_is_not_finite_harms_no_other(
    tmp_path: Path, parts: list[Factors], value: float
) -> None:
    broken = {p: (b.copy(), a) for p, (b, a) in parts[0].items()}
    broken["layers.0.q"][0][0, 0] = value
    write_factors(tmp_path / "AA", broken)
    write_factors(tmp_path / "mix", mixed([(0.7, parts[0]), (0.3, parts[1])]), dtype="F64")
    found = lorafast.lineage(tmp_path / "mix", tmp_path)
    assert found.dependent == {tmp_path / "AA": "holds NaN or infinity"}
    assert str(found).startswith("0.70·A + 0.30·B, residual ")
    assert found.residual < 1e-12
    with pytest.raises(AdapterError, match="holds NaN or infinity"):
        lorafast.lineage(tmp_path / "AA", tmp_path / "B")
    json.loads(found.to_json())


def test_bad_targets_and_candidates(tmp_path: Path, parts: list[Factors]) -> None:
    del parts
    with pytest.raises(ValueError, match="holds 4 adapters; name one"):
        lorafast.lineage(tmp_path, tmp_path / "A")
    with pytest.raises(FileNotFoundError):
        lorafast.lineage(tmp_path / "nowhere", tmp_path / "A")
    other = {p: (m + 1, n, r) for p, (m, n, r) in SHAPES.items()}
    write_factors(tmp_path / "other", random_factors(other))
    with pytest.raises(AdapterError, match="is of another base than the target"):
        lorafast.lineage(tmp_path / "A", tmp_path / "other")
    weights = tmp_path / "D" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    found = lorafast.lineage(tmp_path / "A", tmp_path)
    assert {error.path.name for error in found.errors} == {"D", "other"}
    assert list(found.coefficients) == [tmp_path / "B", tmp_path / "C"]
    with pytest.raises(AdapterError, match="truncated"):
        lorafast.lineage(tmp_path / "D", tmp_path / "A")


# Checkpoints


def run_of(folder: Path, steps: int, names: list[str]) -> list[Array]:
    """Checkpoints that move away from zero by small steps; returns the dense updates."""
    random = np.random.default_rng(4)
    a = {p: random.normal(size=(r, n)) for p, (_, n, r) in SHAPES.items()}
    b = {p: np.zeros((m, r)) for p, (m, _, r) in SHAPES.items()}
    updates = []
    for step in range(steps):
        for p in SHAPES:
            b[p] = b[p] + random.normal(size=b[p].shape) + 0.5
            a[p] = a[p] + 0.2 * random.normal(size=a[p].shape)
        factors = {p: (b[p].copy(), a[p].copy()) for p in SHAPES}
        write_factors(folder / names[step], factors, dtype="F64")
        updates.append(dense(factors))
    return updates


def test_checkpoints_are_put_in_order_whatever_they_are_called(tmp_path: Path) -> None:
    names = ["kilo", "alpha", "zulu", "echo", "bravo", "yankee", "delta", "mike"]
    updates = run_of(tmp_path, len(names), names)
    found = lorafast.trajectory(tmp_path)
    assert found.names == names
    assert found.order == [tmp_path / name for name in names]
    assert not found.agrees
    norms = [np.linalg.norm(update) for update in updates]
    assert [step.norm for step in found.steps] == pytest.approx(norms, rel=1e-12)
    assert found.steps[0].change is None
    moves = [np.linalg.norm(y - x) for x, y in pairwise(updates)]
    for step, move, norm in zip(found.steps[1:], moves, norms[1:], strict=True):
        assert step.change == pytest.approx(move / norm, rel=1e-10)
    assert found.length == pytest.approx(norms[0] + sum(moves), rel=1e-10)
    last = updates[-1]
    for step, update, norm in zip(found.steps, updates, norms, strict=True):
        cosine = float(update @ last) / (norm * norms[-1])
        assert step.cosine_last == pytest.approx(cosine, abs=1e-12)
    assert found.steps[-1].subspace_last == pytest.approx((1.0, 1.0))
    drift = [step.subspace_last[0] for step in found.steps]
    assert drift[0] < drift[-2] < drift[-1]


def test_subspaces_and_ranks_are_those_of_dense_svds(tmp_path: Path) -> None:
    run_of(tmp_path, 2, ["checkpoint-1", "checkpoint-2"])
    found = lorafast.trajectory(tmp_path)
    compared = lorafast.compare(found.order)
    modules = list(compared.modules.values())
    expected = [
        np.mean([module.pairs[0].output_phi[-1][-1] for module in modules]),
        np.mean([module.pairs[0].input_phi[-1][-1] for module in modules]),
    ]
    assert found.steps[1].subspace_previous == pytest.approx(expected, rel=1e-9)
    for step, analysis in zip(found.steps, compared.analyses, strict=True):
        mean = analysis.summary["mean_effective_rank"]
        assert step.effective_rank == pytest.approx(mean, rel=1e-9)


def test_numbers_in_names_and_the_order_given(tmp_path: Path) -> None:
    names = [f"checkpoint-{number}" for number in (50, 100, 500, 1000)]
    run_of(tmp_path, 4, names)
    found = lorafast.trajectory(tmp_path)
    assert found.names == names
    assert found.agrees
    assert lorafast.trajectory(tmp_path, by="name").names == names
    turned = [tmp_path / name for name in reversed(names)]
    given = lorafast.trajectory(turned, by="given")
    assert given.order == turned
    assert not given.agrees
    plain = json.loads(given.to_json())
    assert [step["name"] for step in plain["steps"]] == names[::-1]


def test_a_run_that_shrinks_again_keeps_its_order(tmp_path: Path) -> None:
    """Weight decay makes the norm fall; the way is still the shortest one."""
    first, second = random_factors(SHAPES, 1), random_factors(SHAPES, 2)
    names = ["d", "a", "c", "b", "e"]
    for name, (x, y) in zip(
        names, [(0.6, 0), (1, 0.1), (1, 0.6), (0.7, 0.9), (0.4, 1)], strict=True
    ):
        write_factors(tmp_path / name, mixed([(x, first), (y, second)]))
    assert lorafast.trajectory(tmp_path).names == names


def test_the_way_is_about_the_shortest_there_is() -> None:
    """Among all orders of six points; going to the nearest each time is not enough."""
    greedy_is_worse = 0
    for seed in range(30):
        points = np.random.default_rng(seed).normal(size=(6, 2))
        places = np.concatenate([np.zeros((1, 2)), points])
        steps = np.linalg.norm(places[:, None] - places[None], axis=2)

        def length(order: tuple[int, ...], steps: Array = steps) -> float:
            return float(sum(steps[x, y] for x, y in pairwise((0, *(at + 1 for at in order)))))

        best = min(length(order) for order in permutations(range(6)))
        found = _shortest(points @ points.T, list(range(6)))
        assert sorted(found) == list(range(6))
        assert length(tuple(found)) <= 1.1 * best
        greedy: list[int] = []
        while len(greedy) < 6:
            last = greedy[-1] + 1 if greedy else 0
            greedy.append(min(set(range(6)) - set(greedy), key=lambda at: steps[last, at + 1]))
        greedy_is_worse += length(tuple(greedy)) > 1.1 * best
    assert greedy_is_worse > 3


def test_an_untrained_checkpoint_is_the_first(tmp_path: Path) -> None:
    names = ["c", "b", "a"]
    run_of(tmp_path, 3, names)
    factors = random_factors(SHAPES, 9)
    write_factors(tmp_path / "zero", {p: (0 * b, a) for p, (b, a) in factors.items()})
    found = lorafast.trajectory(tmp_path)
    assert found.names == ["zero", *names]
    assert found.steps[0].norm == 0.0
    assert math.isnan(found.steps[0].cosine_last)
    json.loads(found.to_json())


def test_one_checkpoint_and_bad_ones(tmp_path: Path) -> None:
    write_factors(tmp_path / "a", random_factors(SHAPES, 1))
    assert lorafast.trajectory(tmp_path).names == ["a"]
    other = {p: (m + 1, n, r) for p, (m, n, r) in SHAPES.items()}
    write_factors(tmp_path / "b", random_factors(other, 1))
    with pytest.raises(LorafastError, match="checkpoints are of 2 models"):
        lorafast.trajectory(tmp_path)
    options: dict[str, Any] = {"by": "date"}
    with pytest.raises(ValueError, match="by must be one of"):
        lorafast.trajectory(tmp_path, **options)
