"""Combinations, merges and extraction beside mergekit's own functions.

They are the same where mergekit is right. Where it is not, both results are asserted, so that a
mergekit that was mended is noticed. Its functions are called on small tensors: the base, and the
base with each update.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lorafast
import numpy as np
import pytest
from support.analysis import Array, random_factors, write_factors
from support.dense_methods import MODULE, largest, toy, toys, uniform, written
from support.files import read_checkpoint, read_safetensors, tensor
from support.handmade import make_base

pytest.importorskip("mergekit", reason="mergekit is not installed (the extra test-mergekit)")

import torch
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.registry import get
from mergekit.sparsify import RescaleNorm, bernoulli, della_magprune, magnitude

MODULES = {"model.layers.0.self_attn.q_proj": (24, 20), "model.layers.0.mlp.up_proj": (31, 20)}
SEED = 11


def theirs(
    method: str,
    tensors: Sequence[Array | torch.Tensor],
    *,
    is_base_first: bool = True,
    **asked: Any,
) -> Array:
    """What a method of mergekit makes of tensors; the first is the base, if it takes one."""
    group = TensorGroup.from_tensors(
        [torch.as_tensor(each) for each in tensors], base_index=0 if is_base_first else None
    )
    [result] = get(method)([group], parameters=asked)
    return np.asarray(result.double().numpy())


def of_updates(method: str, deltas: Sequence[Array], **asked: Any) -> Array:
    """The same of updates: of models whose base is zero."""
    if method in ("linear", "karcher"):
        return theirs(method, deltas, is_base_first=False, **asked)
    if method == "slerp":
        return theirs(method, deltas, **asked)
    return theirs(method, [np.zeros_like(deltas[0]), *deltas], **asked)


@pytest.fixture
def own_masks(monkeypatch: pytest.MonkeyPatch) -> list[Array]:
    """Masks by lorafast's numbers in the place of torch's; the probabilities asked for."""
    asked: list[Array] = []

    def drawn(chances: torch.Tensor) -> torch.Tensor:
        number = len(asked)
        asked.append(chances.double().numpy())
        names = list(MODULES)
        numbers = uniform(SEED, names[number // 3], number % 3, tuple(chances.shape))
        return torch.as_tensor(numbers < asked[-1]).to(chances.dtype)

    monkeypatch.setattr(torch, "bernoulli", drawn)
    return asked


def inputs(folder: Path, count: int) -> tuple[list[Path], dict[str, list[Array]]]:
    """Adapters of mixed ranks, and the updates of each module."""
    paths: list[Path] = []
    deltas: dict[str, list[Array]] = {name: [] for name in MODULES}
    for index in range(count):
        shapes = {name: (*shape, 2 + index) for name, shape in MODULES.items()}
        factors = random_factors(shapes, seed=index)
        paths.append(write_factors(folder / f"in{index}", factors))
        for name, (b, a) in factors.items():
            deltas[name].append(b @ a)
    return paths, deltas


def near(found: Array, expected: Array, error: float) -> None:
    assert np.abs(found - expected).max() < error * np.abs(expected).max()


def check(
    folder: Path,
    method: Any,
    count: int,
    expected: Any,
    *,
    weights: list[float] | None = None,
    options: dict[str, Any] | None = None,
    error: float = 1e-9,
) -> None:
    """Hold a combination and a merge against what `expected` makes of a module's updates."""
    paths, deltas = inputs(folder, count)
    wanted = {name: expected(each) for name, each in deltas.items()}
    lorafast.combine(
        paths,
        folder / "adapter",
        method=method,
        weights=weights,
        options=options,
        rank=100,
        seed=SEED,
        dtype="float64",
    )
    for name, update in written(folder / "adapter").items():
        # What is made element by element is made in float32.
        near(update, wanted[name], max(error, 3e-6))
    base = make_base(folder / "base", modules=MODULES, dtype="F64")
    lorafast.merge(
        base,
        paths,
        folder / "out",
        strategy=method,
        weights=weights,
        strategy_options=options,
        seed=SEED,
    )
    before, after = read_checkpoint(base), read_checkpoint(folder / "out")
    for name, update in wanted.items():
        weight = before[f"{name}.weight"].float64()
        near(after[f"{name}.weight"].float64() - weight, update, error)


SIGNED = [1.0, -0.5, 0.75]
POSITIVE = [1.0, 0.5, 0.75]
#: A method and what it is given, mergekit's name of it and what that is given.
SUMS: dict[str, tuple[str, int, list[float] | None, dict[str, Any], str, dict[str, Any]]] = {
    "sum": ("linear", 3, SIGNED, {}, "linear", {"weight": SIGNED, "normalize": False}),
    "task arithmetic": (
        "linear",
        3,
        SIGNED,
        {"lambda": 0.5},
        "task_arithmetic",
        {"weight": SIGNED, "lambda": 0.5},
    ),
    "mean": ("normalized", 3, POSITIVE, {}, "linear", {"weight": POSITIVE}),
    "slerp": ("slerp", 2, None, {"t": 0.3}, "slerp", {"t": 0.3}),
    "nuslerp": ("nuslerp", 2, [3.0, 1.0], {}, "nuslerp", {"weight": [3.0, 1.0]}),
    "karcher of two": ("karcher", 2, None, {}, "karcher", {"max_iter": 300, "tol": 1e-13}),
    "karcher of three": ("karcher", 3, None, {}, "karcher", {"max_iter": 300, "tol": 1e-13}),
    "multislerp": ("multislerp", 3, POSITIVE, {}, "multislerp", {"weight": POSITIVE}),
    "model stock of two": ("model_stock", 2, None, {}, "model_stock", {}),
    "model stock of three": ("model_stock", 3, None, {}, "model_stock", {}),
}


@pytest.mark.parametrize("case", SUMS)
def test_sums_are_the_same(tmp_path: Path, case: str) -> None:
    method, count, weights, options, name, asked = SUMS[case]
    # mergekit adds 1e-8 to norms in multislerp, and an arc cosine near 1 has half of the digits.
    error = 1e-7 if name in ("multislerp", "karcher") else 1e-9
    check(
        tmp_path,
        method,
        count,
        lambda deltas: of_updates(name, deltas, **asked),
        weights=weights,
        options=options,
        error=error,
    )


def test_karcher_by_mergekits_tolerance_is_near(tmp_path: Path) -> None:
    check(tmp_path, "karcher", 3, lambda deltas: of_updates("karcher", deltas), error=1e-4)
    paths, deltas = inputs(tmp_path / "again", 3)
    asked: dict[str, Any] = {"method": "karcher", "options": {"max_iter": 10, "tol": 1e-5}}
    lorafast.combine(paths, tmp_path / "cut", dtype="float64", **asked)
    for name, update in written(tmp_path / "cut").items():
        near(update, of_updates("karcher", deltas[name]), 1e-5)


#: A method, its options, mergekit's options, and whether weights may be of both signs.
ELEMENTS: list[tuple[str, dict[str, Any], dict[str, Any], list[float]]] = [
    ("ties", {"density": 0.3}, {}, POSITIVE),
    ("ties", {"density": 1.0}, {}, POSITIVE),
    ("ties", {"density": 0.3, "normalize": False}, {}, SIGNED),
    ("ties", {"density": 0.3, "lambda": 0.5}, {}, POSITIVE),
    ("dare_linear", {"density": 1.0}, {}, SIGNED),
    ("dare_ties", {"density": 1.0, "normalize": False}, {}, SIGNED),
    ("dare_ties", {"density": 1.0}, {"normalize": True}, POSITIVE),
    ("della", {"density": 1.0, "epsilon": 0.0}, {}, POSITIVE),
    ("della_linear", {"density": 1.0, "epsilon": 0.0}, {}, SIGNED),
    ("breadcrumbs", {"density": 0.3, "gamma": 0.1}, {}, SIGNED),
    ("breadcrumbs", {"density": 0.9, "gamma": 0.3}, {}, SIGNED),
    # Before version 0.1.5 all was zero where gamma takes nothing away.
    ("breadcrumbs", {"density": 0.4, "gamma": 0.0}, {}, SIGNED),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.001}, {}, SIGNED),
    ("breadcrumbs_ties", {"density": 0.3, "gamma": 0.1, "normalize": False}, {}, SIGNED),
    ("breadcrumbs_ties", {"density": 0.3, "gamma": 0.1}, {"normalize": True}, POSITIVE),
]


@pytest.mark.parametrize("case", range(len(ELEMENTS)), ids=lambda case: str(ELEMENTS[case][:2]))
@pytest.mark.filterwarnings("ignore:.*density 1")
def test_elements_are_the_same(tmp_path: Path, case: int) -> None:
    method, options, others, weights = ELEMENTS[case]
    asked = {"weight": weights} | options | others
    check(
        tmp_path,
        method,
        3,
        lambda deltas: of_updates(method, deltas, **asked),
        weights=weights,
        options=options,
        # In float64 but for what is kept: its order is that in float32.
        error=1e-9,
    )


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_sce_is_the_same(tmp_path: Path, share: float) -> None:
    options = {"select_topk": share}
    # The weights are sums of squares in float32.
    check(
        tmp_path,
        "sce",
        3,
        lambda deltas: of_updates("sce", deltas, **options),
        options=options,
        error=1e-7,
    )


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_with_the_same_masks(tmp_path: Path, own_masks: list[Array], method: str) -> None:
    """Without mergekit's scaling, and divided by the density, it is the same."""
    options: dict[str, Any] = {"density": 0.4}
    asked: dict[str, Any] = {"density": 0.4, "weight": SIGNED, "rescale": False}
    if method == "dare_ties":
        options["normalize"] = False
    check(
        tmp_path,
        method,
        3,
        lambda deltas: of_updates(method, deltas, **asked) / 0.4,
        weights=SIGNED,
        options=options,
        # mergekit masks in float32.
        error=1e-6,
    )
    assert len(own_masks) == 3 * len(MODULES)


def test_della_with_the_same_masks(tmp_path: Path, own_masks: list[Array]) -> None:
    """Elements are kept with the same probabilities; each is divided by its own here."""

    def expected(deltas: list[Array]) -> Array:
        kept = []
        for delta in deltas:
            masked = della_magprune(torch.as_tensor(delta), 0.5, 0.2).numpy()
            kept.append(masked / own_masks[-1])
        return np.tensordot(SIGNED, kept, axes=1)

    options = {"density": 0.5, "epsilon": 0.2}
    check(tmp_path, "della_linear", 3, expected, weights=SIGNED, options=options, error=1e-6)
    assert len(own_masks) == 3 * len(MODULES)
    assert own_masks[0].min() == pytest.approx(0.3)
    assert own_masks[0].max() == pytest.approx(0.7)


# Known mistakes, and other definitions.


def single(folder: Path, deltas: Sequence[Array], **asked: Any) -> Array:
    """A combination of updates of one module, whatever their rank."""
    paths = []
    for index, delta in enumerate(deltas):
        factors = {"m": (delta, np.eye(delta.shape[1]))}
        paths.append(write_factors(folder / f"in{index}", factors))
    lorafast.combine(paths, folder / "out", dtype="float64", **asked)
    return written(folder / "out").get("m", np.zeros(deltas[0].shape))


def test_a_norm_is_no_probability(own_masks: list[Array]) -> None:
    """Its DARE and DELLA restore the sum of magnitudes, and so scale by no expected value."""
    name = next(iter(MODULES))
    delta = np.random.default_rng(0).normal(size=MODULES[name])
    given = torch.as_tensor(delta)
    mask = uniform(SEED, name, 0, delta.shape) < 0.4
    found = bernoulli(given, 0.4, RescaleNorm.l1).numpy()
    factor = np.abs(delta).sum() / np.abs(delta * mask).sum()
    np.testing.assert_allclose(found, delta * mask * factor, rtol=1e-5)
    assert abs(factor - 1 / 0.4) > 0.02
    # DELLA's survivors have one factor, and with it the large ones, which are kept more often, more
    # than they had.
    found = della_magprune(given, 0.4, 0.3, RescaleNorm.l1).numpy()
    factors = (found / delta)[found != 0]
    assert factors.max() == pytest.approx(factors.min(), rel=1e-5)
    chances = own_masks[-1][found != 0]
    assert chances.max() / chances.min() > 3


def test_what_a_negative_weight_takes_away_is_added_by_mergekit(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"density": 0.5, "weight": [1.0, -0.5]}
    found = of_updates("ties", [toy("P"), toy("Q")], **asked)
    wrong = [[-14, 0, 0], [20, -22, -10], [-13, 0, 0], [12, 28, -15]]
    np.testing.assert_allclose(found, wrong, atol=1e-12)
    lorafast.combine(
        toys(tmp_path, "PQ"),
        tmp_path / "out",
        method="ties",
        weights=[1.0, -0.5],
        options={"density": 0.5},
        rank=3,
        dtype="float64",
    )
    right = [[-14, 0, 0], [-20, -22, -10], [-13, 0, 0], [12, 28, 15]]
    np.testing.assert_allclose(written(tmp_path / "out")[MODULE], right, atol=1e-5)


def test_signs_are_elected_with_and_without_a_mean(tmp_path: Path) -> None:
    """`normalize` is on wherever signs are elected; in mergekit, in `ties` and `della` alone."""
    deltas = [np.full((2, 2), 1.0), np.full((2, 2), 3.0)]
    asked: dict[str, Any] = {"weight": [1.0, 1.0]}
    for method, each in {
        "ties": 2.0,
        "della": 2.0,
        "dare_ties": 4.0,
        "breadcrumbs_ties": 4.0,
    }.items():
        assert np.all(of_updates(method, deltas, **asked) == each), method
    options: dict[str, dict[str, Any]] = {"della": {"epsilon": 0.0}}
    for method in ("ties", "della", "dare_ties", "breadcrumbs_ties"):
        found = single(
            tmp_path / method, deltas, method=method, options=options.get(method), rank=2
        )
        np.testing.assert_allclose(found, 2.0, atol=1e-6, err_msg=method)


def test_a_density_below_one_element(tmp_path: Path) -> None:
    """mergekit keeps one element at least, where the floor of density times count is none."""
    delta = toy("P")
    found = magnitude(torch.as_tensor(delta), 0.05).numpy()
    assert np.array_equal(found, largest(delta, 1))
    with pytest.raises(ValueError, match="nothing would be left"):
        single(tmp_path, [delta], method="magnitude_prune", options={"density": 0.05}, rank=2)


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
def test_a_way_to_zero_is_straight(tmp_path: Path, method: Any) -> None:
    """mergekit goes from an update to none on a quarter of a circle."""
    delta = np.random.default_rng(1).normal(size=(6, 5))
    asked: dict[str, Any] = {"t": 0.25} if method == "slerp" else {"weight": [3.0, 1.0]}
    found = of_updates(method, [delta, np.zeros_like(delta)], **asked)
    np.testing.assert_allclose(found, np.sin(0.75 * np.pi / 2) * delta, rtol=1e-9)
    given: dict[str, Any] = (
        {"options": {"t": 0.25}} if method == "slerp" else {"weights": [3.0, 1.0]}
    )
    own = single(tmp_path, [delta, np.zeros_like(delta)], method=method, **given)
    np.testing.assert_allclose(own, 0.75 * delta, atol=1e-12)


def test_sce_of_updates_as_small_as_adapters_are(tmp_path: Path) -> None:
    """Below a mean square of 1e-6 in all, mergekit weighs alike, and its divisor is never less."""
    random = np.random.default_rng(2)
    deltas = [random.normal(size=(8, 6)), 3 * random.normal(size=(8, 6))]
    tiny = [2e-4 * delta for delta in deltas]
    right = of_updates("sce", deltas)
    near(single(tmp_path, tiny, method="sce", rank=6), 2e-4 * right, 1e-5)
    wrong = of_updates("sce", tiny) / 2e-4
    assert np.linalg.norm(wrong - right) / np.linalg.norm(right) > 0.1
    agree = np.sign(deltas[0]) == np.sign(deltas[1])
    np.testing.assert_allclose(wrong[agree], ((deltas[0] + deltas[1]) / 2)[agree], rtol=1e-9)


def test_model_stock_of_small_updates(tmp_path: Path) -> None:
    """A cosine in mergekit has a divisor of at least 1e-6, and so shrinks with its updates."""
    random = np.random.default_rng(3)
    shared = random.normal(size=(8, 6))
    deltas = [shared + 0.5 * random.normal(size=(8, 6)) for _ in range(2)]
    tiny = [1e-5 * delta for delta in deltas]
    right = of_updates("model_stock", deltas)
    near(single(tmp_path, tiny, method="model_stock"), 1e-5 * right, 1e-9)
    wrong = of_updates("model_stock", tiny) / 1e-5
    assert np.linalg.norm(wrong) < 0.1 * np.linalg.norm(right)


def test_one_model_is_returned_as_it_is(tmp_path: Path) -> None:
    """mergekit adds in the stored type: a model less its base, plus the base, is another one."""
    paths, deltas = inputs(tmp_path, 1)
    base = make_base(tmp_path / "base", modules=MODULES, dtype="BF16", scale=1.0)
    lorafast.merge(base, paths, tmp_path / "out", strategy="linear", weights=[0.01])
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    differ = []
    for name, [delta] in deltas.items():
        weight = torch.as_tensor(before[f"{name}.weight"].float64())
        tuned = (weight + torch.as_tensor(0.01 * delta)).bfloat16()
        own = after[f"{name}.weight"].float64()
        assert np.array_equal(own, tuned.double().numpy())
        again = theirs("task_arithmetic", [weight.bfloat16(), tuned], weight=[1.0])
        differ.append(np.mean(again != own))
    assert 0.001 < np.mean(differ) < 0.3


# Extraction.


def extraction() -> Any:
    with warnings.catch_warnings():
        # Its dependencies use names that NumPy has moved.
        warnings.simplefilter("ignore")
        from mergekit.scripts import extract_lora
    return extract_lora


def test_an_extraction_is_the_same(tmp_path: Path) -> None:
    name, shape = "model.layers.0.mlp.up_proj", (48, 40)
    base = make_base(tmp_path / "base", modules={name: shape})
    random = np.random.default_rng(4)
    weight = read_checkpoint(base)[f"{name}.weight"].float64()
    update = random.normal(size=(48, 3)) @ random.normal(size=(3, 40))
    noise = 0.01 * random.normal(size=shape)
    others = {f"{name}.weight": tensor(weight + update + noise, "F32")}
    tuned = make_base(tmp_path / "tuned", modules={}, others=others)
    asked = SimpleNamespace(transpose=False, max_rank=3, distribute_scale=True, sv_epsilon=0)
    module = extraction()
    difference = torch.as_tensor(
        read_checkpoint(tuned)[f"{name}.weight"].float64() - weight, dtype=torch.float32
    )
    a, b = module.TaskVectorDecompositionTask.execute(asked, difference)
    report = lorafast.extract(tuned, base, tmp_path / "out", rank=3)
    assert report.ranks == {name: 3}
    near(written(tmp_path / "out")[name], (b @ a).double().numpy(), 1e-4)
    # A threshold that nothing reaches makes factors of no rank, which PEFT refuses.
    asked.sv_epsilon = 1e9
    a, b = module.TaskVectorDecompositionTask.execute(asked, difference)
    assert (tuple(a.shape), tuple(b.shape)) == ((0, 40), (48, 0))


def test_a_difference_of_narrow_weights_is_rounded_by_mergekit() -> None:
    random = torch.Generator().manual_seed(5)
    weight = torch.randn(64, 64, generator=random).bfloat16()
    tuned = (weight.float() + 0.3 * torch.randn(64, 64, generator=random)).bfloat16()
    found = extraction().TaskVectorTask.execute(None, weight, tuned).double()
    exact = tuned.double() - weight.double()
    assert 1e-5 < float((found - exact).norm() / exact.norm()) < 1e-2


def test_biases_that_mergekit_extracts_are_not_loaded(tmp_path: Path) -> None:
    """Its config does not say that the second factors have biases; here they are whole ones."""
    config = extraction().make_config_dict(
        base_ref=SimpleNamespace(model=SimpleNamespace(path="base")),
        max_rank=4,
        modules_to_save=[],
        target_modules=["q_proj"],
        module_ranks={},
    )
    assert not config.get("lora_bias")
    name = "model.layers.0.self_attn.q_proj"
    random = np.random.default_rng(6)
    weight, bias = random.normal(size=(24, 20)), random.normal(size=24)
    update = random.normal(size=(24, 2)) @ random.normal(size=(2, 20))
    for path, factor in (("base", 0.0), ("tuned", 1.0)):
        others = {
            f"{name}.weight": tensor(weight + factor * update, "F32"),
            f"{name}.bias": tensor(bias + factor, "F32"),
        }
        make_base(tmp_path / path, modules={}, others=others)
    lorafast.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=2)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["bias"] == "all"
    tensors = read_safetensors(tmp_path / "out" / "adapter_model.safetensors")
    [found] = [value for key, value in tensors.items() if key.endswith("base_layer.bias")]
    np.testing.assert_allclose(found.float64(), bias + 1, atol=1e-6)
