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
from support.files import read_checkpoint, read_safetensors, tensor, write_safetensors
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


FUSED, PARTS = "double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn"


def on_a_fused_projection(
    folder: Path, of_second: dict[str, int]
) -> tuple[Path, list[Path], list[Array]]:
    """A model with fused projections, an adapter of these, and one of single projections."""
    random, width = np.random.default_rng(8), 8
    base = folder / "flux.safetensors"
    weights = {
        f"{FUSED}.weight": tensor(random.normal(size=(3 * width, width)), "F32"),
        "single_blocks.0.linear2.weight": tensor(random.normal(size=(width, 5 * width)), "F32"),
    }
    write_safetensors(base, weights, {})
    whole = adapter_tensors({FUSED: (3 * width, width)}, rank=3, seed=1)
    modules = {f"{PARTS}.{name}": (width, width) for name in of_second}
    single = adapter_tensors(modules, rank=2, seed=2)
    adapters = [
        make_adapter(folder / "whole", whole, r=3, lora_alpha=6),
        make_adapter(folder / "single", single, r=2, lora_alpha=2),
    ]

    def product(tensors: Any, module: str) -> Array:
        a = tensors[f"{PREFIX}{module}.lora_A.weight"].float64()
        return np.asarray(tensors[f"{PREFIX}{module}.lora_B.weight"].float64() @ a)

    other = np.zeros((3 * width, width))
    for name, place in of_second.items():
        other[place * width : (place + 1) * width] = product(single, f"{PARTS}.{name}")
    return base, adapters, [2 * product(whole, FUSED), other]


@pytest.mark.parametrize("of_second", [{"to_q": 0}, {"to_q": 0, "to_v": 2}], ids=["one", "two"])
@pytest.mark.parametrize(
    ("asked", "method"),
    [
        ({"strategy": "slerp", "strategy_options": {"t": 0.3}}, lambda u: slerp(u[0], u[1], 0.3)),
        ({"strategy": "nuslerp", "weights": [3.0, 1.0]}, lambda u: slerp(u[0], u[1], 0.25)),
        ({"strategy": "karcher"}, karcher),
        ({"strategy": "model_stock"}, model_stock),
        ({"strategy": "projection"}, projection),
    ],
    ids=["slerp", "nuslerp", "karcher", "model_stock", "projection"],
)
def test_one_adapter_changes_a_part_of_what_another_does(
    tmp_path: Path, asked: dict[str, Any], method: Method, of_second: dict[str, int]
) -> None:
    """What it does not change counts as zero: the tensor is weighed as a whole."""
    base, adapters, updates = on_a_fused_projection(tmp_path, of_second)
    lorafast.merge(base, adapters, tmp_path / "out", **asked)
    before, after = (
        read_safetensors(file)[f"{FUSED}.weight"].float64()
        for file in (base, tmp_path / "out" / base.name)
    )
    np.testing.assert_allclose(after - before, method(updates), atol=1e-6)
    merged = tmp_path / "out" / base.name
    assert lorafast.verify(base, adapters, merged, full=True, **asked).ok


def test_parts_that_are_weighed_together_have_one_weight(tmp_path: Path) -> None:
    base, adapters, updates = on_a_fused_projection(tmp_path, {"to_q": 0, "to_v": 2})
    one: list[Any] = [{"*.qkv": 3.0}, {"*.attn.*": 1.0}]
    lorafast.merge(base, adapters, tmp_path / "out", strategy="nuslerp", weights=one)
    before, after = (
        read_safetensors(file)[f"{FUSED}.weight"].float64()
        for file in (base, tmp_path / "out" / base.name)
    )
    np.testing.assert_allclose(after - before, slerp(updates[0], updates[1], 0.25), atol=1e-6)
    two: list[Any] = [3.0, {"*.to_q": 1.0, "*.to_v": 2.0}]
    with pytest.raises(ValueError, match="give both modules one weight"):
        lorafast.plan(base, adapters, strategy="nuslerp", weights=two)
    # Sums weigh each module by itself.
    assert lorafast.plan(base, adapters, strategy="linear", weights=two).tensors_merged


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
