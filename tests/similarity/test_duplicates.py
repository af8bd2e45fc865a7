"""The same update in every kind of clothes, and near misses that are none."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast import Duplicates
from support.analysis import Array, Factors, random_factors, write_factors
from support.files import Tensor, read_safetensors, tensor, write_safetensors
from support.reference import PREFIX

SHAPES = {"layers.0.q": (80, 64, 6), "layers.1.q": (48, 96, 5), "layers.1.up": (120, 40, 8)}


@pytest.fixture
def factors() -> Factors:
    """Trained as adapters are: a spectrum that falls, and a small B."""
    made = {}
    for module, (b, a) in random_factors(SHAPES, 7).items():
        fall = 0.8 ** np.arange(b.shape[1])
        made[module] = (0.01 * b * fall, a / math.sqrt(a.shape[1]))
    return made


def each(factors: Factors, change: Callable[[Array, Array], tuple[Array, Array]]) -> Factors:
    return {module: change(b, a) for module, (b, a) in factors.items()}


def regauged(factors: Factors, seed: int = 0) -> Factors:
    random = np.random.default_rng(seed)

    def change(b: Array, a: Array) -> tuple[Array, Array]:
        gauge = random.normal(size=(b.shape[1], b.shape[1]))
        return b @ gauge, np.linalg.solve(gauge, a)

    return each(factors, change)


def truncated(factors: Factors, rank: int) -> Factors:
    def change(b: Array, a: Array) -> tuple[Array, Array]:
        left, values, right = np.linalg.svd(b @ a, full_matrices=False)
        root = np.sqrt(values[:rank])
        return left[:, :rank] * root, root[:, None] * right[:rank]

    return each(factors, change)


def groups(found: Duplicates) -> list[tuple[str, list[str]]]:
    return [(group.tier, group.names) for group in found]


def only_group(folder: Path) -> lorafast.DuplicateGroup:
    found = lorafast.duplicates(folder)
    assert len(found) == 1, groups(found)
    return found[0]


def test_the_same_bytes(tmp_path: Path, factors: Factors) -> None:
    path = write_factors(tmp_path / "a", factors, dtype="F32")
    shutil.copytree(path, tmp_path / "b")
    group = only_group(tmp_path)
    assert group.tier == "same_bytes"
    assert group.members == [tmp_path / "a", tmp_path / "b"]
    (evidence,) = group.evidence
    assert evidence.path == tmp_path / "b"
    digest = hashlib.sha256((path / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert evidence.figures["sha256"] == digest
    assert digest[:16] in evidence.text


def test_the_same_bytes_under_another_alpha_are_a_scaled_copy(
    tmp_path: Path, factors: Factors
) -> None:
    write_factors(tmp_path / "a", factors, dtype="F32", alpha=8.0)
    write_factors(tmp_path / "b", factors, dtype="F32", alpha=20.0)
    group = only_group(tmp_path)
    assert group.tier == "scaled"
    assert group.evidence[0].figures["factor"] == pytest.approx(2.5, rel=1e-12)


def test_the_same_tensors_under_another_header(tmp_path: Path, factors: Factors) -> None:
    path = write_factors(tmp_path / "a", factors, dtype="BF16")
    shutil.copytree(path, tmp_path / "b")
    weights = tmp_path / "b" / "adapter_model.safetensors"
    tensors = read_safetensors(weights)
    write_safetensors(weights, dict(reversed(tensors.items())), {"made": "elsewhere"})
    group = only_group(tmp_path)
    assert group.tier == "same_tensors"
    assert group.names == ["a", "b"]


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_another_factorisation(tmp_path: Path, factors: Factors, dtype: str) -> None:
    write_factors(tmp_path / "a", factors, dtype=dtype)
    write_factors(tmp_path / "b", regauged(factors), dtype=dtype)
    group = only_group(tmp_path)
    assert group.tier == "same_update"
    figures = group.evidence[0].figures
    assert isinstance(figures["difference"], float)
    assert figures["difference"] <= figures["tolerance"]
    # Written with one rounding of each factor, whatever the type.
    unit = {"F64": 1e-15, "F32": 1e-7, "F16": 1e-3, "BF16": 1e-2}[dtype]
    assert figures["difference"] < 20 * unit


def test_another_rank_of_factors(tmp_path: Path, factors: Factors) -> None:
    write_factors(tmp_path / "a", factors, dtype="F32")
    wider = each(
        factors,
        lambda b, a: (np.concatenate([b, 0.5 * b], 1), np.concatenate([a / 2, a], 0)),
    )
    write_factors(tmp_path / "b", wider, dtype="F32")
    assert only_group(tmp_path).tier == "same_update"


def test_alpha_moved_into_the_factors(tmp_path: Path, factors: Factors) -> None:
    write_factors(tmp_path / "a", factors, dtype="F32", alpha=24.0)
    baked = each(factors, lambda b, a: (b * 24.0 / a.shape[0], a))
    write_factors(tmp_path / "b", baked, dtype="F32")
    assert only_group(tmp_path).tier == "same_update"


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_another_dtype_and_back(tmp_path: Path, factors: Factors, dtype: str) -> None:
    write_factors(tmp_path / "a", factors, dtype="F32")
    rounded = write_factors(tmp_path / "b", factors, dtype=dtype)
    # A float32 file of 16-bit numbers has been rounded to 16 bits, whatever its type says.
    tensors = read_safetensors(rounded / "adapter_model.safetensors")
    (tmp_path / "c").mkdir()
    widened = {name: tensor(value.float64(), "F32") for name, value in tensors.items()}
    write_safetensors(tmp_path / "c" / "adapter_model.safetensors", widened)
    shutil.copy(rounded / "adapter_config.json", tmp_path / "c")
    group = only_group(tmp_path)
    assert group.tier == "same_update"
    # The most precise is the one to keep.
    assert group.names == ["a", "b", "c"]


@pytest.mark.parametrize("factor", [-0.7, 3.0])
def test_a_scaled_copy(tmp_path: Path, factors: Factors, factor: float) -> None:
    write_factors(tmp_path / "a", factors, dtype="F32")
    other = each(regauged(factors), lambda b, a: (factor * b, a))
    write_factors(tmp_path / "b", other, dtype="F32")
    group = only_group(tmp_path)
    assert group.tier == "scaled"
    assert group.evidence[0].figures["factor"] == pytest.approx(factor, rel=1e-5)


@pytest.mark.parametrize(("rank", "dtype"), [(1, "F32"), (3, "F32"), (3, "BF16"), (4, "F64")])
def test_a_truncation(tmp_path: Path, factors: Factors, rank: int, dtype: str) -> None:
    write_factors(tmp_path / "whole", factors, dtype=dtype)
    write_factors(tmp_path / "short", truncated(factors, rank), dtype=dtype)
    group = only_group(tmp_path)
    assert group.tier == "truncated"
    assert group.names == ["whole", "short"]
    values = [np.linalg.svd(b @ a, compute_uv=False) ** 2 for b, a in factors.values()]
    kept = sum(v[:rank].sum() for v in values) / sum(v.sum() for v in values)
    assert group.evidence[0].figures["kept"] == pytest.approx(kept, rel=1e-2)


def test_a_truncation_may_be_scaled(tmp_path: Path, factors: Factors) -> None:
    write_factors(tmp_path / "whole", factors, dtype="F32")
    short = each(truncated(factors, 3), lambda b, a: (2.5 * b, a))
    write_factors(tmp_path / "short", short, dtype="F32")
    group = only_group(tmp_path)
    assert group.tier == "truncated"
    assert group.names == ["whole", "short"]


def test_a_truncation_in_wider_factors_is_one(tmp_path: Path, factors: Factors) -> None:
    write_factors(tmp_path / "whole", factors, dtype="F32")

    def widen(b: Array, a: Array) -> tuple[Array, Array]:
        # The same product of rank 2 by four columns: what is left of the others is rounding.
        return np.hstack([b, b]), np.vstack([0.3 * a, 0.7 * a])

    write_factors(tmp_path / "short", each(truncated(factors, 2), widen), dtype="F32")
    group = only_group(tmp_path)
    assert group.tier == "truncated"
    assert group.names == ["whole", "short"]


@pytest.mark.parametrize("side", [0, 1])
def test_one_rounded_factor_is_rounding_enough(tmp_path: Path, factors: Factors, side: int) -> None:
    def rounded(*pair: Array) -> tuple[Array, Array]:
        one = pair[side].astype(np.float32).view(np.uint32) + np.uint32(0x8000)
        short = (one & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
        return (short, pair[1]) if side == 0 else (pair[0], short)

    write_factors(tmp_path / "a", factors, dtype="F32")
    write_factors(tmp_path / "b", each(factors, rounded), dtype="F32")
    assert only_group(tmp_path).tier == "same_update"


def test_a_family_is_told_apart_by_tiers(tmp_path: Path, factors: Factors) -> None:
    path = write_factors(tmp_path / "a0", factors, dtype="F32")
    shutil.copytree(path, tmp_path / "a1")
    write_factors(tmp_path / "a2", regauged(factors), dtype="F32")
    write_factors(tmp_path / "a3", factors, dtype="BF16")
    write_factors(tmp_path / "a4", each(factors, lambda b, a: (2 * b, a)), dtype="F32")
    write_factors(tmp_path / "a5", truncated(factors, 2), dtype="F32")
    for seed in range(3):
        write_factors(tmp_path / f"b{seed}", random_factors(SHAPES, seed), dtype="F32")
    found = lorafast.duplicates(tmp_path)
    assert groups(found) == [
        ("same_bytes", ["a0", "a1"]),
        ("same_update", ["a0", "a2", "a3"]),
        ("scaled", ["a0", "a4"]),
        ("truncated", ["a0", "a5"]),
    ]
    assert found.redundant == 5
    assert [found[0], *found[1:]] == list(found)
    plain = json.loads(found.to_json())
    assert [group["tier"] for group in plain["groups"]] == [group.tier for group in found]
    assert plain["groups"][1]["members"] == [str(p) for p in found[1].members]
    threads = lorafast.duplicates(tmp_path, threads=1)
    assert threads.to_dict() == found.to_dict()


def nudged(factors: Factors, amount: float, seed: int = 1) -> Factors:
    """The factors with noise of that share of the norm of B."""
    random = np.random.default_rng(seed)

    def change(b: Array, a: Array) -> tuple[Array, Array]:
        noise = random.normal(size=b.shape)
        return b + amount * np.linalg.norm(b) / np.linalg.norm(noise) * noise, a

    return each(factors, change)


@pytest.mark.parametrize(
    ("amount", "dtype"),
    [(1e-4, "F32"), (1e-2, "F32"), (0.14, "F32"), (0.03, "BF16"), (1e-10, "F64")],
)
def test_a_neighbour_is_no_duplicate(
    tmp_path: Path, factors: Factors, amount: float, dtype: str
) -> None:
    """Down to a cosine of 1 − 5e-9, which in float32 is a change and no rounding."""
    write_factors(tmp_path / "a", factors, dtype=dtype)
    write_factors(tmp_path / "b", nudged(factors, amount), dtype=dtype)
    write_factors(tmp_path / "c", regauged(nudged(factors, amount, 2)), dtype=dtype)
    found = lorafast.duplicates(tmp_path)
    assert groups(found) == []
    cosine = lorafast.similarity(tmp_path).matrix[0, 1]
    assert cosine == pytest.approx(1 - amount**2 / 2, abs=0.6 * amount**2 + 1e-12)


def test_a_truncation_of_a_neighbour_is_none(tmp_path: Path, factors: Factors) -> None:
    write_factors(tmp_path / "a", factors, dtype="F32")
    write_factors(tmp_path / "b", truncated(nudged(factors, 1e-2), 3), dtype="F32")
    assert groups(lorafast.duplicates(tmp_path)) == []


@pytest.mark.parametrize("kind", ["same", "scaled", "truncated"])
@pytest.mark.parametrize("angle", [1e-3, 1.0])
def test_one_spectrum_is_not_one_update(
    tmp_path: Path, factors: Factors, kind: str, angle: float
) -> None:
    """Turned a little, or far: every singular value is the same, and no direction is."""
    write_factors(tmp_path / "a", factors, dtype="F32")
    random = np.random.default_rng(1)

    def turn(b: Array, a: Array) -> tuple[Array, Array]:
        skew = random.normal(size=(len(b), len(b)))
        skew = angle * (skew - skew.T) / np.linalg.norm(skew, 2)
        identity = np.eye(len(b))
        return np.linalg.solve(identity - skew / 2, (identity + skew / 2) @ b), a

    other = each(factors, turn)
    if kind == "scaled":
        other = each(other, lambda b, a: (2.5 * b, a))
    elif kind == "truncated":
        other = truncated(other, 3)
    write_factors(tmp_path / "b", other, dtype="F32")
    assert groups(lorafast.duplicates(tmp_path)) == []


def test_one_module_scaled_alone_is_not_a_scaled_copy(tmp_path: Path, factors: Factors) -> None:
    write_factors(tmp_path / "a", factors, dtype="F32")
    other = dict(factors)
    b, a = other["layers.1.q"]
    other["layers.1.q"] = (1.01 * b, a)
    write_factors(tmp_path / "b", other, dtype="F32")
    assert groups(lorafast.duplicates(tmp_path)) == []


def test_a_module_that_does_nothing_is_as_good_as_none(tmp_path: Path, factors: Factors) -> None:
    write_factors(tmp_path / "a", factors, dtype="F32")
    idle = random_factors({"layers.2.q": (16, 12, 2)})["layers.2.q"]
    more = {**factors, "layers.2.q": (0 * idle[0], idle[1])}
    write_factors(tmp_path / "b", regauged(factors) | {"layers.2.q": more["layers.2.q"]})
    assert only_group(tmp_path).tier == "same_update"


@pytest.mark.parametrize("same", [True, False])
def test_what_they_do_beside_updates_counts(tmp_path: Path, factors: Factors, same: bool) -> None:
    head = np.random.default_rng(0).normal(size=(5, 7))

    def others(values: Array, dtype: str) -> Mapping[str, Tensor]:
        return {f"{PREFIX}score.weight": tensor(values, dtype)}

    settings: dict[str, Any] = {"modules_to_save": ["score"]}
    write_factors(tmp_path / "a", factors, dtype="F32", others=others(head, "F32"), **settings)
    changed = head if same else head + 0.1 * np.eye(5, 7)
    write_factors(
        tmp_path / "b", regauged(factors), dtype="BF16", others=others(changed, "BF16"), **settings
    )
    found = lorafast.duplicates(tmp_path)
    assert [group.tier for group in found] == (["same_update"] if same else [])
    write_factors(tmp_path / "c", regauged(factors, 3), dtype="F32")
    assert len(lorafast.duplicates(tmp_path)) == len(found), "c has no head at all"


def test_untrained_adapters_are_one(tmp_path: Path, factors: Factors) -> None:
    for seed in range(3):
        zero = {p: (0 * b, a) for p, (b, a) in random_factors(SHAPES, seed).items()}
        write_factors(tmp_path / f"a{seed}", zero)
    write_factors(tmp_path / "b", factors)
    group = only_group(tmp_path)
    assert (group.tier, group.names) == ("zero_update", ["a0", "a1", "a2"])
    assert "zero" in group.evidence[0].text


def test_untrained_adapters_of_different_bases_are_none(tmp_path: Path) -> None:
    """Nothing is nothing on one base alone, whatever tells the bases apart."""

    def zero(name: str, seed: int, base: str | None, shapes: Any = SHAPES) -> None:
        factors = {p: (0 * b, a) for p, (b, a) in random_factors(shapes, seed).items()}
        write_factors(tmp_path / name, factors, base_model_name_or_path=base)

    zero("a1", 1, "hub/llama")
    zero("b1", 2, "hub/qwen")
    zero("c1", 3, "hub/mistral")
    assert groups(lorafast.duplicates(tmp_path)) == []
    # The same file for another model: it is as empty, and says nothing of it.
    zero("b2", 1, "hub/qwen")
    zero("a2", 4, "/models/Llama/")
    # Another base of the same name, by its shapes.
    zero("d1", 5, "hub/llama", {p: (m + 1, n, r) for p, (m, n, r) in SHAPES.items()})
    # Others of its modules.
    zero("a3", 6, "hub/llama", {"layers.0.other": (9, 8, 2)})
    found = lorafast.duplicates(tmp_path)
    assert groups(found) == [("zero_update", ["a1", "a2", "a3"]), ("zero_update", ["b1", "b2"])]
    assert found.to_dict()["groups"][0]["meaning"].startswith(
        "a low-rank update of zero on the same"
    )
    # A copy is one, and so are trained ones whatever base they name.
    shutil.copytree(tmp_path / "c1", tmp_path / "c2")
    write_factors(tmp_path / "t1", random_factors(SHAPES, 9), base_model_name_or_path="hub/llama")
    write_factors(tmp_path / "t2", random_factors(SHAPES, 9), base_model_name_or_path="hub/copy")
    tiers = [group.tier for group in lorafast.duplicates(tmp_path)]
    assert tiers == ["same_bytes", "same_bytes", "zero_update", "zero_update"]


def test_saved_modules_alone_are_held_against_each_other(tmp_path: Path) -> None:
    """Their low-rank updates are zero, which does not make them untrained."""
    zero = {p: (0 * b, a) for p, (b, a) in random_factors(SHAPES, 1).items()}
    head = np.random.default_rng(0).normal(size=(3, 4))
    for at, values in enumerate((head, head, 2 * head)):
        others = {f"{PREFIX}score.weight": tensor(values, ("F64", "F32", "F64")[at])}
        factors = {p: (b, (at + 1) * a) for p, (b, a) in zero.items()}
        write_factors(tmp_path / f"a{at}", factors, others=others, modules_to_save=["score"])
    group = only_group(tmp_path)
    assert (group.tier, group.names) == ("zero_update", ["a0", "a1"])
    assert "never trained" not in group.evidence[0].text


@pytest.mark.parametrize("beside", ["magnitude", "pissa"])
def test_a_product_of_zero_is_not_all_that_an_adapter_does(tmp_path: Path, beside: str) -> None:
    """What rescales the base, or began with components of it, changes it."""
    zero = {p: (0 * b, a) for p, (b, a) in random_factors(SHAPES, 1).items()}
    others: dict[str, Any] = {}
    settings: dict[str, Any] = {"init_lora_weights": "pissa"}
    if beside == "magnitude":
        settings = {"use_dora": True}
        for path, (rows, *_) in SHAPES.items():
            others[f"{PREFIX}{path}.lora_magnitude_vector"] = tensor(np.full(rows, 2.0))
    for name in "ab":
        base = f"hub/{name}"
        more = {"base_model_name_or_path": base, **settings}
        write_factors(tmp_path / name, zero, others=others, **more)
    # What changes nothing is not the same in another base; a copy of what changes something is.
    group = only_group(tmp_path)
    assert (group.tier, group.names) == ("same_bytes", ["a", "b"])


def test_one_file_with_two_starts_is_two_updates(tmp_path: Path, factors: Factors) -> None:
    write_factors(tmp_path / "plain", factors)
    write_factors(tmp_path / "pissa", factors, init_lora_weights="pissa")
    assert groups(lorafast.duplicates(tmp_path)) == []
    notes = lorafast.similarity(tmp_path).notes
    assert any("what its start took out of the base's weights" in note for note in notes)


def test_what_is_not_finite_is_compared_byte_by_byte(tmp_path: Path, factors: Factors) -> None:
    broken = {p: (b.copy(), a) for p, (b, a) in factors.items()}
    broken["layers.0.q"][0][0, 0] = np.inf
    path = write_factors(tmp_path / "a", broken, dtype="F32")
    shutil.copytree(path, tmp_path / "b")
    write_factors(tmp_path / "c", regauged(factors), dtype="F32")
    found = lorafast.duplicates(tmp_path)
    assert groups(found) == [("same_bytes", ["a", "b"])]
    assert "NaN or infinity" in found.notes[0]


def test_broken_adapters_and_clashing_names(tmp_path: Path, factors: Factors) -> None:
    for run in ("x", "y"):
        write_factors(tmp_path / run / "final", factors, dtype="F32")
    broken = write_factors(tmp_path / "z", factors)
    (broken / "adapter_config.json").write_text("{")
    found = lorafast.duplicates(tmp_path)
    assert groups(found) == [("same_bytes", ["x/final", "y/final"])]
    assert [error.path for error in found.errors] == [tmp_path / "z"]


def test_many_are_sorted_out(tmp_path: Path) -> None:
    """Three hundred small adapters of one module, every tenth of them in other clothes."""
    pairs = 30
    for number in range(300):
        own = random_factors({"q": (24, 18, 3)}, number % 270)
        if number >= 270:
            own = regauged(own, number)
        write_factors(tmp_path / f"a{number:03}", own, dtype="F32")
    found = lorafast.duplicates(tmp_path)
    assert groups(found) == [
        ("same_update", [f"a{number:03}", f"a{number + 270:03}"]) for number in range(pairs)
    ]
