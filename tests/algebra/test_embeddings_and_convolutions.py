"""Embeddings and convolutions under every method, as adapters and as merges, against NumPy.

The update of an embedding is PEFT's product B·A, (width, vocabulary), the transpose of its stored
weight; that of a convolution has its kernel's elements beside one another in a row.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.analysis import Array
from support.dense_methods import (
    breadcrumbs,
    core_space,
    dare,
    della,
    elected,
    iso_c,
    knots,
    largest,
    sce,
    ties,
    truncated,
    tsv_m,
    uniform,
)
from support.files import Tensor, read_checkpoint, read_safetensors, tensor, write_safetensors
from support.handmade import adapter_config, make_base
from support.reference import PREFIX, read_updates

#: The weights as they are stored.
WEIGHTS = {
    "embed": (30, 12),
    "narrow.embed": (9, 16),
    "l.conv": (20, 6, 3, 3),
    "l.point": (14, 10, 1, 1),
    "l.line": (12, 8, 5),
    "l.q": (18, 16),
}
OWN = [1.0, -0.5, 0.75]
SEED = 5


def is_embedding(module: str) -> bool:
    return module.endswith("embed")


def matrix_shape(module: str) -> tuple[int, int]:
    """The shape of the update as a matrix."""
    first, *rest = WEIGHTS[module]
    return (rest[0], first) if is_embedding(module) else (first, int(np.prod(rest)))


def stored(module: str, update: Array) -> Array:
    """An update as its weight is stored."""
    return update.T if is_embedding(module) else update.reshape(WEIGHTS[module])


def inputs(
    folder: Path, modules: Iterable[str] = WEIGHTS
) -> tuple[list[Path], dict[str, list[tuple[Array, Array]]]]:
    """Three adapters of mixed ranks and scales; of each module the factors of its update."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    paths: list[Path] = []
    factors: dict[str, list[tuple[Array, Array]]] = {module: [] for module in modules}
    for index in range(3):
        rank, alpha = 2 + index, 3.0
        tensors: dict[str, Tensor] = {}
        for module, own in factors.items():
            shape = WEIGHTS[module]
            rows, columns = matrix_shape(module)
            left, right = random.normal(size=(rows, rank)), random.normal(size=(rank, columns))
            key = f"{PREFIX}{module}.lora_"
            if is_embedding(module):
                tensors[f"{key}embedding_A"] = tensor(right, "F64")
                tensors[f"{key}embedding_B"] = tensor(left, "F64")
            else:
                ones = [1] * (len(shape) - 2)
                tensors[f"{key}A.weight"] = tensor(right.reshape(rank, *shape[1:]), "F64")
                tensors[f"{key}B.weight"] = tensor(left.reshape(rows, rank, *ones), "F64")
            own.append((left * alpha / rank, right))
        path = folder / f"in{index}"
        path.mkdir()
        config = adapter_config(r=rank, lora_alpha=alpha, target_modules=list(factors))
        (path / "adapter_config.json").write_text(json.dumps(config))
        write_safetensors(path / "adapter_model.safetensors", tensors)
        paths.append(path)
    return paths, factors


def made(path: Path) -> dict[str, Array]:
    """The updates of a written adapter."""
    found = {}
    for module, update in read_updates(path).items():
        assert update.embedding == is_embedding(module)
        if not update.embedding:
            assert update.a.shape[1:] == WEIGHTS[module][1:]
        found[module] = update.delta()
    return found


def make_zeros(path: Path) -> Path:
    """A base whose merge is what is added to it."""
    others = {
        f"{module}.weight": tensor(np.zeros(shape), "F64") for module, shape in WEIGHTS.items()
    }
    return make_base(path, modules={}, others=others, dtype="F64")


def near(found: Array, expected: Array, error: float) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < error * np.abs(expected).max()


def total(kept: Sequence[Array], weights: Sequence[float] = OWN) -> Array:
    return np.tensordot(weights, np.array(kept), axes=1)


def masked(function: Callable[..., Array], deltas: Sequence[Array], *given: Any) -> list[Array]:
    """Deltas of a module, which goes first among what is given, with their own random numbers."""
    module, *options = given
    return [
        function(delta, *options, uniform(SEED, module, index, delta.shape))
        for index, delta in enumerate(deltas)
    ]


def merged(blocks: Sequence[Array]) -> Array:
    return ties(blocks, OWN, 0.4)


Factors = list[tuple[Array, Array]]
#: Options, and what they make of a module's factors and updates.
JOINT: dict[str, tuple[dict[str, Any], Callable[[Factors, list[Array]], Array]]] = {
    "svd": ({}, lambda _, d: truncated(total(d), 4)),
    "knots": ({"density": 0.4}, lambda _, d: knots(d, merged)),
    "core_space": ({"density": 0.4}, lambda f, _: core_space(f, merged)),
    "tsv_m": ({}, lambda _, d: tsv_m(d, OWN)),
    "iso_c": ({}, lambda _, d: iso_c(total(d))),
}


@pytest.mark.parametrize("method", JOINT)
def test_methods_of_singular_vectors(tmp_path: Path, method: Any) -> None:
    paths, factors = inputs(tmp_path)
    options, reference = JOINT[method]
    report = lorafast.combine(
        paths, tmp_path / "out", method=method, weights=OWN, options=options, dtype="float64"
    )
    found = made(tmp_path / "out")
    assert set(found) == set(WEIGHTS)
    for module, own in factors.items():
        expected = reference(own, [left @ right for left, right in own])
        near(found[module], expected, 1e-9)
        record = report.modules[module]
        assert np.prod(record.shape) == expected.size
        if method != "svd":
            assert record.norm == pytest.approx(np.linalg.norm(expected), rel=1e-9)
    cut = lorafast.combine(
        paths, tmp_path / "cut", method=method, rank=2, options=options, dtype="float64"
    )
    assert set(cut.ranks.values()) == {2}
    assert set(made(tmp_path / "cut")) == set(WEIGHTS)


#: The same of the updates alone, with the module whose masks are drawn.
ELEMENTS: dict[str, tuple[dict[str, Any], Callable[[list[Array], str], Array]]] = {
    "ties": ({"density": 0.3}, lambda d, _: ties(d, OWN, 0.3)),
    "magnitude_prune": (
        {"density": 0.3},
        lambda d, _: total([largest(x, int(0.3 * x.size)) for x in d]),
    ),
    "breadcrumbs": (
        {"density": 0.3, "gamma": 0.1},
        lambda d, _: total([breadcrumbs(x, 0.3, 0.1) for x in d]),
    ),
    "breadcrumbs_ties": (
        {"density": 0.3, "gamma": 0.1},
        lambda d, _: elected([breadcrumbs(x, 0.3, 0.1) for x in d], OWN),
    ),
    "dare_linear": ({"density": 0.4}, lambda d, m: total(masked(dare, d, m, 0.4))),
    "dare_ties": ({"density": 0.4}, lambda d, m: elected(masked(dare, d, m, 0.4), OWN)),
    "della": (
        {"density": 0.5, "epsilon": 0.2},
        lambda d, m: elected(masked(della, d, m, 0.5, 0.2), OWN),
    ),
    "della_linear": (
        {"density": 0.5, "epsilon": 0.2},
        lambda d, m: total(masked(della, d, m, 0.5, 0.2)),
    ),
    "sce": ({"select_topk": 0.6}, lambda d, _: sce(d, 0.6)),
}


@pytest.mark.parametrize("method", ELEMENTS)
def test_methods_of_elements(tmp_path: Path, method: Any) -> None:
    paths, factors = inputs(tmp_path)
    options, reference = ELEMENTS[method]
    asked: dict[str, Any] = {"weights": None if method == "sce" else OWN, "seed": SEED}
    lorafast.combine(
        paths,
        tmp_path / "out",
        method=method,
        options=options,
        rank=30,
        dtype="float64",
        **asked,
    )
    found = made(tmp_path / "out")

    def expected() -> dict[str, Array]:
        return {
            module: reference([left @ right for left, right in own], module)
            for module, own in factors.items()
        }

    for module, update in expected().items():
        near(found[module], update, 3e-6)
    base = make_zeros(tmp_path / "base")
    given: dict[str, Any] = {"strategy": method, "strategy_options": options, **asked}
    lorafast.merge(base, paths, tmp_path / "model", **given)
    weights = read_checkpoint(tmp_path / "model")
    for module, update in expected().items():
        weight = weights[f"{module}.weight"].float64()
        near(weight, stored(module, update), 1e-6 if method == "sce" else 1e-9)
    assert lorafast.verify(base, paths, tmp_path / "model", full=True, **given).ok


@pytest.mark.parametrize("method", ["slerp", "karcher", "model_stock", "projection", "centroid"])
def test_sums_as_adapters_and_as_merges(tmp_path: Path, method: Any) -> None:
    paths, factors = inputs(tmp_path)
    count = 2 if method == "slerp" else 3
    report = lorafast.combine(paths[:count], tmp_path / "out", method=method, dtype="float64")
    found = made(tmp_path / "out")
    base = make_zeros(tmp_path / "base")
    lorafast.merge(base, paths[:count], tmp_path / "model", strategy=method)
    weights = read_checkpoint(tmp_path / "model")
    for module, own in factors.items():
        coefficients = report.modules[module].coefficients
        assert coefficients is not None
        expected = total([left @ right for left, right in own[:count]], coefficients)
        near(found[module], expected, 1e-9)
        near(weights[f"{module}.weight"].float64(), stored(module, expected), 1e-9)


def as_parameter(path: Path, source: Path) -> Path:
    """The same adapter with its embeddings' factors as those of the weight as it is stored."""
    path.mkdir()
    shutil.copy(source / "adapter_config.json", path)
    turned: dict[str, Tensor] = {}
    for name, value in read_safetensors(source / "adapter_model.safetensors").items():
        stem, embedding, side = name.partition("lora_embedding_")
        if embedding:
            other = "B" if side == "A" else "A"
            turned[f"{stem}lora_{other}.weight"] = tensor(value.float64().T, "F64")
        else:
            turned[name] = value
    write_safetensors(path / "adapter_model.safetensors", turned)
    return path


@pytest.mark.parametrize("method", ["linear", "ties", "karcher", *JOINT])
@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [2, 1, 0]])
def test_embeddings_of_either_orientation(tmp_path: Path, method: Any, order: list[int]) -> None:
    """PEFT's by width, MLX's by tokens, and factors of the weight as it is stored."""
    modules = ["embed", "narrow.embed", "l.q"]
    plain, _ = inputs(tmp_path / "in", modules)
    mixed = [plain[0], tmp_path / "mlx", as_parameter(tmp_path / "parameter", plain[2])]
    lorafast.convert(plain[1], mixed[1], to="mlx", dtype="float64")
    options = {"density": 0.4} if method in ("ties", "knots") else {}
    if method == "core_space":
        options = {"merge": "linear"}
    asked: dict[str, Any] = {"method": method, "options": options, "rank": 9}
    results = []
    for name, paths in (("one", plain), ("two", mixed)):
        ordered = [paths[index] for index in order]
        lorafast.combine(ordered, tmp_path / name, dtype="float64", **asked)
        results.append({})
        for module, update in read_updates(tmp_path / name).items():
            delta = update.delta()
            is_turned = is_embedding(module) and not update.embedding
            results[-1][module] = delta.T if is_turned else delta
    for module in modules:
        near(results[1][module], results[0][module], 3e-6 if method == "ties" else 1e-9)


@pytest.mark.parametrize("method", ["linear", "dare_linear", "iso_c"])
def test_a_result_may_have_embeddings_by_tokens(tmp_path: Path, method: Any) -> None:
    plain, _ = inputs(tmp_path / "in", ["embed", "l.q"])
    options = {"density": 0.5} if method == "dare_linear" else {}
    asked: dict[str, Any] = {"method": method, "options": options, "rank": 12, "dtype": "float32"}
    lorafast.combine(plain, tmp_path / "peft", **asked)
    lorafast.combine(plain, tmp_path / "mlx", to="mlx", **asked)
    lorafast.convert(tmp_path / "mlx", tmp_path / "back", to="peft")
    one, two = made(tmp_path / "peft"), made(tmp_path / "back")
    for module, update in one.items():
        near(two[module], update, 1e-6)
