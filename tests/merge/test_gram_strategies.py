"""Strategies that weigh each tensor's updates by their inner products, against dense NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from numpy.typing import NDArray
from support.files import read_checkpoint, tensor
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base, write_checkpoint
from support.reference import PREFIX

Array = NDArray[np.float64]


def slerp(one: Array, other: Array, t: float) -> Array:
    norms = np.linalg.norm(one), np.linalg.norm(other)
    if 0 in norms:
        return (1 - t) * one + t * other
    angle = math.acos(float((one * other).sum() / (norms[0] * norms[1])))
    first, second = math.sin((1 - t) * angle), math.sin(t * angle)
    return np.asarray((first * one + second * other) / math.sin(angle))


def karcher(updates: list[Array]) -> Array:
    norms = [np.linalg.norm(each) for each in updates]
    units = [each / norm for each, norm in zip(updates, norms, strict=True)]
    mean = np.asarray(sum(units) / np.linalg.norm(np.asarray(sum(units))))
    for _ in range(200):
        tangent = np.zeros_like(mean)
        for unit in units:
            cosine = float((mean * unit).sum())
            angle = math.acos(min(1.0, cosine))
            tangent += (unit - cosine * mean) * angle / math.sin(angle) / len(units)
        length = float(np.linalg.norm(tangent))
        if length < 1e-14:
            break
        mean = np.cos(length) * mean + np.sin(length) * tangent / length
    return np.asarray(mean * np.mean(norms))


def model_stock(updates: list[Array]) -> Array:
    count = len(updates)
    cosines = [
        (one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other)
        for index, one in enumerate(updates)
        for other in updates[:index]
    ]
    mean = float(np.mean(cosines))
    t = count * mean / (1 + (count - 1) * mean)
    return np.asarray(t * sum(updates) / count)


def projection(updates: list[Array]) -> Array:
    first, *rest = (each.ravel() for each in updates)
    span = np.array(rest).T
    solved = np.linalg.lstsq(span, first, rcond=None)[0]
    return np.asarray(first - span @ solved).reshape(updates[0].shape)


Method = Callable[[list[Array]], Array]
CASES: list[tuple[str, dict[str, Any], list[float] | None, int, Method]] = [
    ("linear", {"lambda": 0.5}, [1.0, -2.0, 3.0], 3, lambda u: (u[0] - 2 * u[1] + 3 * u[2]) / 2),
    ("cat", {}, [1.0, -2.0], 2, lambda u: u[0] - 2 * u[1]),
    ("normalized", {}, [1.0, 3.0], 2, lambda u: u[0] / 4 + u[1] * 3 / 4),
    ("centroid", {}, None, 3, lambda u: np.asarray(sum(u) / 3)),
    ("slerp", {"t": 0.3}, None, 2, lambda u: slerp(u[0], u[1], 0.3)),
    ("nuslerp", {}, [3.0, 1.0], 2, lambda u: slerp(u[0], u[1], 0.25)),
    ("karcher", {}, None, 3, karcher),
    ("model_stock", {}, None, 3, model_stock),
    ("projection", {}, None, 3, projection),
]


def make_adapters(folder: Path, count: int) -> tuple[list[Path], list[dict[str, Array]]]:
    kinds = [
        (adapter_tensors(rank=4, seed=1), {"r": 4, "lora_alpha": 8}, 2.0),
        (adapter_tensors(rank=7, seed=2), {"r": 7, "lora_alpha": 3.5}, 0.5),
        (adapter_tensors(rank=33, dtype="F16", seed=3), {"r": 33, "lora_alpha": 33}, 1.0),
    ]
    paths, updates = [], []
    for number, (tensors, settings, scale) in enumerate(kinds[:count]):
        paths.append(make_adapter(folder / f"adapter-{number}", tensors, **settings))
        of_module = {}
        for module in MODULES:
            a = tensors[f"{PREFIX}{module}.lora_A.weight"].float64()
            b = tensors[f"{PREFIX}{module}.lora_B.weight"].float64()
            of_module[module] = scale * (b @ a)
        updates.append(of_module)
    return paths, updates


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_against_dense_updates(
    tmp_path: Path, case: tuple[str, dict[str, Any], list[float] | None, int, Method]
) -> None:
    name, options, weights, count, method = case
    base = make_base(tmp_path / "base", shards=2)
    adapters, updates = make_adapters(tmp_path, count)
    arguments: dict[str, Any] = {
        "strategy": name,
        "strategy_options": options,
        "weights": weights,
    }
    report = lorafast.merge(base, adapters, tmp_path / "out", **arguments)
    assert len(report.groups) == count
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    for module in MODULES:
        change = method([each[module] for each in updates])
        found = after[f"{module}.weight"].float64() - before[f"{module}.weight"].float64()
        np.testing.assert_allclose(found, change, rtol=0, atol=1e-6)
    assert lorafast.verify(base, adapters, tmp_path / "out", full=True, **arguments).ok
    undone = lorafast.subtract(tmp_path / "out", adapters, tmp_path / "undone", **arguments)
    assert undone.output_path
    again = read_checkpoint(tmp_path / "undone")
    for tensor_name, value in before.items():
        np.testing.assert_allclose(again[tensor_name].float64(), value.float64(), atol=1e-6)


def test_slerp_of_a_module_that_one_lacks_is_linear(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    some = dict(list(MODULES.items())[:1])
    one = make_adapter(tmp_path / "one", adapter_tensors(rank=4, seed=1))
    other = make_adapter(tmp_path / "other", adapter_tensors(some, rank=4, seed=2))
    options = {"t": 0.25}
    lorafast.merge(base, [one, other], tmp_path / "out", strategy="slerp", strategy_options=options)
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    tensors = adapter_tensors(rank=4, seed=1)
    for module in list(MODULES)[1:]:
        a = tensors[f"{PREFIX}{module}.lora_A.weight"].float64()
        b = tensors[f"{PREFIX}{module}.lora_B.weight"].float64()
        found = after[f"{module}.weight"].float64() - before[f"{module}.weight"].float64()
        np.testing.assert_allclose(found, 0.75 * 2 * (b @ a), atol=1e-6)


def test_coefficients_of_the_toys(tmp_path: Path) -> None:
    """X, Y and Z, whose coefficients were found from their Gram matrix and by mergekit."""
    base = make_base(tmp_path / "base", modules={"layer.proj": (4, 3)})
    write_checkpoint(base, {"layer.proj.weight": tensor(np.zeros((4, 3)), "F32")})
    toys = {
        "X": ([[1, 2], [0, 1], [2, 0], [1, -1]], [[1, 0, 2], [0, 1, 1]], 4),
        "Y": ([[1, 0], [1, 1], [0, 2], [-1, 1]], [[2, 1, 0], [1, -1, 1]], 2),
        "Z": ([[1], [2], [0], [1]], [[1, 1, -1]], 3),
    }
    adapters = []
    for name, (b, a, alpha) in toys.items():
        tensors = {
            f"{PREFIX}layer.proj.lora_A.weight": tensor(np.array(a, float), "F32"),
            f"{PREFIX}layer.proj.lora_B.weight": tensor(np.array(b, float), "F32"),
        }
        settings: dict[str, Any] = {
            "r": len(a),
            "lora_alpha": alpha,
            "target_modules": ["proj"],
        }
        adapters.append(make_adapter(tmp_path / name, tensors, **settings))
    for name, wanted in {
        "karcher": [0.38874231, 0.88634212, 0.43897084],
        "multislerp": [0.38963757, 0.92005283, 0.41525247],
        "model_stock": [0.3977327943 / 3] * 3,
    }.items():
        plan = lorafast.plan(base, adapters, strategy=name).to_dict()
        (merged,) = (each for each in plan["tensors"] if each["updates"])
        found = [update["weight"] for update in merged["updates"]]
        np.testing.assert_allclose(found, wanted, atol=2e-8)


@pytest.mark.parametrize(
    ("name", "options", "weights", "words"),
    [
        ("slerp", {"t": 2}, None, "option t is 2"),
        ("slerp", {"density": 0.5}, None, 'takes no option "density"'),
        ("slerp", {}, [1.0, 2.0], "takes no weights"),
        ("normalized", {}, [1.0, -1.0], "divided by their sum"),
        ("karcher", {"tol": 0}, None, "option tol is 0"),
        ("ties", {"t": 0.5}, None, 'takes no option "t"'),
        ("average", {}, [1.0, 2.0], "only the strategy"),
    ],
)
def test_what_a_strategy_does_not_take_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any], weights: list[float] | None, words: str
) -> None:
    base = make_base(tmp_path / "base")
    adapters, _ = make_adapters(tmp_path, 2)
    with pytest.raises(ValueError, match=words):
        lorafast.plan(base, adapters, strategy=name, strategy_options=options, weights=weights)


def test_slerp_is_for_two(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapters, _ = make_adapters(tmp_path, 3)
    with pytest.raises(ValueError, match="slerp is for 2 adapters, and there are 3"):
        lorafast.plan(base, adapters, strategy="slerp")


def test_what_is_no_product_is_refused_by_name(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tensors = adapter_tensors(seed=1)
    for module, (rows, _) in MODULES.items():
        name = f"{PREFIX}{module}.lora_magnitude_vector"
        tensors[name] = tensor(np.ones(rows), "F32")
    dora = make_adapter(tmp_path / "dora", tensors, use_dora=True)
    plain = make_adapter(tmp_path / "plain")
    with pytest.raises(lorafast.UnsupportedAdapterError, match="DoRA"):
        lorafast.merge(base, [plain, dora], tmp_path / "out", strategy="slerp")
    # A sum with coefficients that are given can have them.
    assert lorafast.plan(base, [plain, dora], strategy="linear", weights=[1, 0.5]).tensors_merged
