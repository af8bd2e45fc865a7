"""Every algorithm of LyCORIS and PEFT, on every kind of layer, against its formula in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from numpy.typing import NDArray
from support.files import (
    Tensor,
    narrow,
    read_checkpoint,
    read_safetensors,
    tensor,
    widen,
    write_safetensors,
)
from support.handmade import make_base

Array = NDArray[np.float64]
Parts = Mapping[str, Array]

MODULE = "down_blocks.0.layer"
KEY = "lora_unet_down_blocks_0_layer"
#: The layers: the shape of the weight.
LAYERS: dict[str, tuple[int, ...]] = {
    "linear": (24, 20),
    "square": (20, 20),
    "tall": (40, 4),
    "conv 1x1": (24, 20, 1, 1),
    "conv 3x3": (24, 20, 3, 3),
}
DTYPES = ("F32", "F16", "BF16")
DORA = "dora of the inputs"


def generator(*seed: object) -> np.random.Generator:
    return np.random.default_rng([ord(letter) for letter in "".join(map(str, seed))])


def flat(values: Array) -> Array:
    return values.reshape(values.shape[0], -1)


def tucker(core: Array, a: Array, b: Array) -> Array:
    return np.einsum("ij...,io,jn->on...", core, a, b)


def low_rank(parts: Parts, weight: Array, s: float) -> Array:
    up, down = flat(parts["lora_up.weight"]), parts["lora_down.weight"]
    if "lora_mid.weight" in parts:
        mid = parts["lora_mid.weight"]
        return s * np.einsum("mn...,om,ni->oi...", mid, up, flat(down)).reshape(weight.shape)
    return s * (up @ flat(down)).reshape(weight.shape)


def loha(parts: Parts, weight: Array, s: float) -> Array:
    sides = []
    for side in "12":
        a, b = parts[f"hada_w{side}_a"], parts[f"hada_w{side}_b"]
        core = parts.get(f"hada_t{side}")
        sides.append(flat(a) @ flat(b) if core is None else flat(tucker(core, a, b)))
    return s * (sides[0] * sides[1]).reshape(weight.shape)


def lokr(parts: Parts, weight: Array, s: float) -> Array:
    sides = []
    for side in "12":
        if f"lokr_w{side}" in parts:
            sides.append(flat(parts[f"lokr_w{side}"]))
            continue
        a, b = parts[f"lokr_w{side}_a"], parts[f"lokr_w{side}_b"]
        core = parts.get(f"lokr_t{side}")
        sides.append(a @ flat(b) if core is None else flat(tucker(core, a, b)))
    is_scaled = "lokr_w1" not in parts or "lokr_w2" not in parts
    return (s if is_scaled else 1.0) * np.kron(*sides).reshape(weight.shape)


def glora(parts: Parts, weight: Array, s: float) -> Array:
    a1, a2 = parts["a1.weight"], parts["a2.weight"]
    b1, b2 = parts["b1.weight"], parts["b2.weight"]
    turned = np.einsum("oi...,ij->oj...", weight, a1 @ a2)
    return s * (turned + (flat(b1) @ flat(b2)).reshape(weight.shape))


def ia3(parts: Parts, weight: Array, s: float) -> Array:
    vector = parts["weight"].reshape(-1)
    axis = 1 if parts["on_input"].item() else 0
    shape = [1] * weight.ndim
    shape[axis] = -1
    return weight * vector.reshape(shape)


def rotations(blocks: Array, alpha: float, outputs: int) -> Array:
    skew = blocks - np.swapaxes(blocks, -1, -2)
    norm = float(np.sqrt((skew**2).sum()))
    if 0 < alpha * outputs < norm:
        skew = skew * (alpha * outputs / norm)
    one = np.eye(blocks.shape[-1])
    return (one + skew) @ np.linalg.inv(one - skew)


def oft(parts: Parts, weight: Array, s: float) -> Array:
    blocks = parts["oft_blocks"]
    outputs, extent = weight.shape[0], blocks.shape[-1]
    r = rotations(blocks, float(parts.get("alpha", np.zeros(()))), outputs)
    w = weight.reshape(outputs, -1)
    if blocks.ndim == 3:
        runs = w.reshape(-1, extent, w.shape[1])
        w = np.einsum("knm,knx->kmx", r, runs).reshape(outputs, -1)
    else:
        for stage, turn in enumerate(r):
            half = 2**stage * extent // 2
            # Rows that are half apart lie side by side.
            mixed = (
                w.reshape(-1, 2, half, w.shape[1]).swapaxes(1, 2).reshape(-1, extent, w.shape[1])
            )
            mixed = np.einsum("kmn,knx->kmx", turn, mixed).reshape(-1, half, 2, w.shape[1])
            w = mixed.swapaxes(1, 2).reshape(outputs, -1)
    if "rescale" in parts:
        w = w * parts["rescale"].reshape(-1, 1)
    return w.reshape(weight.shape) - weight


def full(parts: Parts, weight: Array, s: float) -> Array:
    return parts["diff"]


@dataclass(frozen=True)
class Algorithm:
    """How the parts of a layer are made, and the formula."""

    parts: Callable[[tuple[int, ...]], Mapping[str, tuple[int, ...]]]
    formula: Callable[[Parts, Array, float], Array]
    #: The rank as trainers call it, which the scale divides by.
    rank: int = 1
    kinds: tuple[str, ...] = tuple(LAYERS)
    scaled: bool = True
    alpha: float | None = 3.0
    size: float = 0.3
    values: Mapping[str, float] = field(default_factory=dict)


def ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (len(shape) - 2)


def wide(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape[1:]))


CONVOLUTIONS = ("conv 1x1", "conv 3x3")
ALGORITHMS: dict[str, Algorithm] = {
    "lora": Algorithm(
        lambda s: {"lora_down.weight": (4, *s[1:]), "lora_up.weight": (s[0], 4, *ones(s))},
        low_rank,
        4,
    ),
    "lora, no alpha": Algorithm(
        lambda s: {"lora_down.weight": (4, *s[1:]), "lora_up.weight": (s[0], 4, *ones(s))},
        low_rank,
        4,
        alpha=None,
    ),
    "locon, mid": Algorithm(
        lambda s: {
            "lora_down.weight": (4, s[1], *ones(s)),
            "lora_mid.weight": (4, 4, *s[2:]),
            "lora_up.weight": (s[0], 4, *ones(s)),
        },
        low_rank,
        4,
        kinds=CONVOLUTIONS,
    ),
    "loha": Algorithm(
        lambda s: {
            "hada_w1_a": (s[0], 3),
            "hada_w1_b": (3, wide(s)),
            "hada_w2_a": (s[0], 3),
            "hada_w2_b": (3, wide(s)),
        },
        loha,
        3,
    ),
    "loha, high rank": Algorithm(
        lambda s: {
            "hada_w1_a": (s[0], 7),
            "hada_w1_b": (7, wide(s)),
            "hada_w2_a": (s[0], 7),
            "hada_w2_b": (7, wide(s)),
        },
        loha,
        7,
    ),
    "loha, kernels kept": Algorithm(
        lambda s: {
            "hada_w1_a": (s[0], 3, *ones(s)),
            "hada_w1_b": (3, *s[1:]),
            "hada_w2_a": (s[0], 3, *ones(s)),
            "hada_w2_b": (3, *s[1:]),
        },
        loha,
        3,
        kinds=CONVOLUTIONS,
    ),
    "loha, tucker": Algorithm(
        lambda s: {
            "hada_t1": (3, 3, *s[2:]),
            "hada_w1_a": (3, s[0]),
            "hada_w1_b": (3, s[1]),
            "hada_t2": (3, 3, *s[2:]),
            "hada_w2_a": (3, s[0]),
            "hada_w2_b": (3, s[1]),
        },
        loha,
        3,
        kinds=CONVOLUTIONS,
    ),
    "lokr, both whole": Algorithm(
        lambda s: {"lokr_w1": (4, 2), "lokr_w2": (s[0] // 4, s[1] // 2, *s[2:])}, lokr, 1
    ),
    "lokr, alpha infinite": Algorithm(
        lambda s: {"lokr_w1": (4, 2), "lokr_w2": (s[0] // 4, s[1] // 2, *s[2:])},
        lokr,
        1,
        alpha=np.inf,
    ),
    "lokr, w2 in factors": Algorithm(
        lambda s: {
            "lokr_w1": (4, 2),
            "lokr_w2_a": (s[0] // 4, 2),
            "lokr_w2_b": (2, wide(s) // 2),
        },
        lokr,
        2,
    ),
    "lokr, both in factors": Algorithm(
        lambda s: {
            "lokr_w1_a": (4, 1),
            "lokr_w1_b": (1, 2),
            "lokr_w2_a": (s[0] // 4, 2),
            "lokr_w2_b": (2, wide(s) // 2),
        },
        lokr,
        2,
    ),
    "lokr, w1 in factors": Algorithm(
        lambda s: {
            "lokr_w1_a": (s[0] // 4, 2),
            "lokr_w1_b": (2, wide(s) // 2),
            "lokr_w2": (4, 2),
        },
        lokr,
        2,
    ),
    "lokr, more ranks than extents": Algorithm(
        lambda s: {
            "lokr_w1_a": (4, 8),
            "lokr_w1_b": (8, 2),
            "lokr_w2_a": (s[0] // 4, 8),
            "lokr_w2_b": (8, wide(s) // 2),
        },
        lokr,
        8,
    ),
    "lokr, tucker": Algorithm(
        lambda s: {
            "lokr_w1": (4, 2),
            "lokr_t2": (2, 2, *s[2:]),
            "lokr_w2_a": (2, s[0] // 4),
            "lokr_w2_b": (2, s[1] // 2),
        },
        lokr,
        2,
        kinds=CONVOLUTIONS,
    ),
    "lokr, w1 reaches into the kernel": Algorithm(
        lambda s: {
            "lokr_w1_a": (12, 2),
            "lokr_w1_b": (2, 12),
            "lokr_w2_a": (2, 2),
            "lokr_w2_b": (2, 15),
        },
        lokr,
        2,
        kinds=("conv 3x3",),
    ),
    "full": Algorithm(lambda s: {"diff": s}, full, scaled=False, alpha=None),
    "glora": Algorithm(
        lambda s: {
            "a1.weight": (s[1], 3),
            "a2.weight": (3, s[1]),
            "b1.weight": (s[0], 3),
            "b2.weight": (3, *s[1:]),
        },
        glora,
        3,
    ),
    "ia3, outputs": Algorithm(
        lambda s: {"weight": (s[0],)}, ia3, scaled=False, alpha=None, values={"on_input": 0.0}
    ),
    "ia3, inputs": Algorithm(
        lambda s: {"weight": (1, s[1], *ones(s))},
        ia3,
        scaled=False,
        alpha=None,
        values={"on_input": 1.0},
    ),
    "oft": Algorithm(lambda s: {"oft_blocks": (s[0] // 4, 4, 4)}, oft, scaled=False, alpha=0.0),
    "oft, constrained": Algorithm(
        lambda s: {"oft_blocks": (s[0] // 4, 4, 4), "rescale": (s[0], 1, *ones(s))},
        oft,
        scaled=False,
        alpha=0.01,
    ),
    "boft": Algorithm(
        lambda s: {"oft_blocks": (2, s[0] // 4, 4, 4), "rescale": (s[0], 1, *ones(s))},
        oft,
        scaled=False,
        alpha=0.05,
        kinds=("linear", "tall", *CONVOLUTIONS),
    ),
}
#: Algorithms that can have DoRA's magnitudes beside them.
WITH_MAGNITUDES = (
    "lora",
    "locon, mid",
    "loha",
    "loha, tucker",
    "lokr, both whole",
    "lokr, w2 in factors",
)


def made(name: str, kind: str, dtype: str) -> tuple[dict[str, Tensor], dict[str, Array]]:
    """The tensors of a layer's parts, and their values as they are stored."""
    algorithm = ALGORITHMS[name]
    random = generator(name, kind)
    parts: dict[str, Array] = {
        part: random.normal(scale=algorithm.size, size=shape)
        for part, shape in algorithm.parts(LAYERS[kind]).items()
    }
    parts |= {part: np.array(value) for part, value in algorithm.values.items()}
    if algorithm.alpha is not None:
        parts["alpha"] = np.array(algorithm.alpha)
    tensors = {part: tensor(value, dtype) for part, value in parts.items()}
    return tensors, {part: value.float64() for part, value in tensors.items()}


def new_weight(name: str, parts: Parts, weight: Array) -> Array:
    """The merged weight by the formula."""
    algorithm = ALGORITHMS[name]
    alpha = parts.get("alpha")
    scale = 1.0 if alpha is None or not algorithm.scaled else float(alpha) / algorithm.rank
    total = weight + algorithm.formula(parts, weight, scale)
    magnitude = parts.get("dora_scale")
    if magnitude is None:
        return total
    is_of_inputs = magnitude.ndim > 1 and magnitude.shape[0] == 1
    axes = tuple(axis for axis in range(weight.ndim) if axis != int(is_of_inputs))
    norms = np.sqrt((total**2).sum(axes, keepdims=True))
    return total * (magnitude.reshape(norms.shape) / norms)


def based(
    path: Path, shape: tuple[int, ...], dtype: str, *, bias: bool = False
) -> tuple[Path, Array]:
    random = generator(shape, "base")
    weight = tensor(random.normal(size=shape), dtype)
    others = {f"{MODULE}.weight": weight}
    if bias:
        others[f"{MODULE}.bias"] = tensor(random.normal(size=shape[:1]), dtype)
    return make_base(path, modules={}, dtype=dtype, others=others, config={"model_type": "x"}), (
        weight.float64()
    )


def close(actual: Tensor, expected: Array, start: Array, strength: float = 1.0) -> None:
    """Within one unit in the last place of the stored type, and float32's arithmetic."""
    values = actual.float64()
    unit = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}[actual.dtype]
    rounded = widen(actual.dtype, narrow(expected, actual.dtype)).reshape(expected.shape)
    size = np.maximum(np.abs(expected), np.abs(start))
    allowed = unit * np.abs(rounded) * 0.51 + 3e-6 * (size + np.abs(size).mean() + 1)
    assert (np.abs(values - expected) <= allowed).all(), np.abs(values - expected).max()
    assert not np.array_equal(values, start)


def merge_parts(
    tmp_path: Path,
    shape: tuple[int, ...],
    tensors: Mapping[str, Tensor],
    dtype: str = "F32",
    **options: Any,
) -> tuple[Tensor, Array, Path]:
    base, weight = based(tmp_path / "base", shape, dtype)
    file = write_safetensors(
        tmp_path / "style.safetensors", {f"{KEY}.{part}": value for part, value in tensors.items()}
    )
    lorafast.merge(base, file, tmp_path / "out", **options)
    assert lorafast.verify(base, file, tmp_path / "out", **options).ok
    return read_checkpoint(tmp_path / "out")[f"{MODULE}.weight"], weight, file


CASES = [
    pytest.param(name, kind, dtype, id=f"{name}-{kind}-{dtype}")
    for name, algorithm in ALGORITHMS.items()
    for kind in algorithm.kinds
    for dtype in DTYPES
    if dtype == "F32" or kind in {"linear", "conv 3x3"}
]


@pytest.mark.parametrize(("name", "kind", "dtype"), CASES)
def test_a_merge_is_the_formula(name: str, kind: str, dtype: str, tmp_path: Path) -> None:
    tensors, parts = made(name, kind, dtype)
    merged, weight, file = merge_parts(tmp_path, LAYERS[kind], tensors, dtype)
    close(merged, new_weight(name, parts, weight), weight)
    uses = {one["use"] for one in lorafast.inspect(file)["adapter"]["coverage"]["tensors"]}
    assert uses == {"used"}


@pytest.mark.parametrize("name", WITH_MAGNITUDES)
@pytest.mark.parametrize("axis", ["outputs", "inputs"])
@pytest.mark.parametrize("kind", ["linear", "square", "conv 3x3"])
def test_magnitudes_rescale_the_sum_on_their_axis(
    name: str, axis: str, kind: str, tmp_path: Path
) -> None:
    if kind not in ALGORITHMS[name].kinds:
        pytest.skip("a core is a convolution's")
    shape = LAYERS[kind]
    tensors, parts = made(name, kind, "F32")
    count = shape[0] if axis == "outputs" else shape[1]
    magnitude = 1 + generator(name, axis).uniform(size=count)
    lies = (count, 1, *ones(shape)) if axis == "outputs" else (1, count, *ones(shape))
    tensors["dora_scale"] = tensor(magnitude.reshape(lies))
    parts["dora_scale"] = tensors["dora_scale"].float64()
    merged, weight, file = merge_parts(tmp_path, shape, tensors)
    expected = new_weight(name, parts, weight)
    close(merged, expected, weight)
    # A part of it is a part of the whole change.
    lorafast.merge(tmp_path / "base", file, tmp_path / "half", strategy="weighted", weights=[0.5])
    half = read_checkpoint(tmp_path / "half")[f"{MODULE}.weight"]
    close(half, weight + 0.5 * (expected - weight), weight)
    features = lorafast.analyze(file).summary["features"]
    assert any("magnitude" in feature for feature in features)
    with pytest.raises(lorafast.LorafastError, match="neither the merged model nor the adapter"):
        lorafast.subtract(tmp_path / "out", file, tmp_path / "back")


def test_a_vector_of_magnitudes_is_the_outputs(tmp_path: Path) -> None:
    tensors, parts = made("lora", "square", "F32")
    tensors["dora_scale"] = tensor(1 + generator("vector").uniform(size=20))
    parts["dora_scale"] = tensors["dora_scale"].float64()
    merged, weight, _ = merge_parts(tmp_path, LAYERS["square"], tensors)
    close(
        merged,
        new_weight("lora", parts | {"dora_scale": parts["dora_scale"][:, None]}, weight),
        weight,
    )


def test_norms_and_biases_are_added_unscaled(tmp_path: Path) -> None:
    random = generator("norms")
    base, weight = based(tmp_path / "base", (24, 20), "F32", bias=True)
    tensors, parts = made("lora", "linear", "F32")
    file = {f"{KEY}.{part}": value for part, value in tensors.items()}
    file[f"{KEY}.diff_b"] = tensor(random.normal(size=24))
    file["lora_te_model_norm.w_norm"] = tensor(random.normal(size=20))
    adapter = write_safetensors(tmp_path / "x.safetensors", file)
    lorafast.merge(base, adapter, tmp_path / "out")
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    close(after[f"{MODULE}.weight"], new_weight("lora", parts, weight), weight)
    for name, part in {
        f"{MODULE}.bias": f"{KEY}.diff_b",
        "model.norm.weight": "lora_te_model_norm.w_norm",
    }.items():
        start = before[name].float64()
        close(after[name], start + file[part].float64(), start)
    assert lorafast.verify(base, adapter, tmp_path / "out").ok
    lorafast.subtract(tmp_path / "out", adapter, tmp_path / "back")
    back = read_checkpoint(tmp_path / "back")
    for name, value in before.items():
        assert np.allclose(back[name].float64(), value.float64(), atol=1e-5)
    kinds = {module.kind for module in lorafast.analyze(adapter).modules.values()}
    assert kinds == {"linear", "norm", "bias"}


def test_an_explicit_scale_counts_more_than_an_alpha(tmp_path: Path) -> None:
    tensors, parts = made("lora", "linear", "F32")
    tensors["scale"] = tensor(np.array(0.25))
    merged, weight, file = merge_parts(tmp_path, (24, 20), tensors)
    close(merged, weight + low_rank(parts, weight, 0.25), weight)
    uses = {
        one["name"]: one["use"] for one in lorafast.inspect(file)["adapter"]["coverage"]["tensors"]
    }
    assert uses[f"{KEY}.alpha"] == "not_needed"


@pytest.mark.parametrize("dtype", ["I64", "F16", "BF16"])
def test_an_alpha_is_of_whatever_type(dtype: str, tmp_path: Path) -> None:
    tensors, parts = made("lora", "linear", "F32")
    tensors["alpha"] = tensor(np.array([2]), dtype)
    merged, weight, file = merge_parts(tmp_path, (24, 20), tensors)
    close(merged, weight + low_rank(parts, weight, 0.5), weight)
    lorafast.analyze(file)
    lorafast.scan(file)


def test_products_of_half_precision_factors_do_not_overflow(tmp_path: Path) -> None:
    random = generator("overflow")
    big = {
        "hada_w1_a": random.uniform(-6e4, 6e4, size=(24, 2)),
        "hada_w1_b": random.normal(size=(2, 20)),
        "hada_w2_a": random.uniform(-6e4, 6e4, size=(24, 2)),
        "hada_w2_b": random.normal(size=(2, 20)) * 1e-6,
    }
    tensors = {part: tensor(value, "F16") for part, value in big.items()}
    parts = {part: value.float64() for part, value in tensors.items()}
    merged, weight, _ = merge_parts(tmp_path, (24, 20), tensors)
    close(merged, weight + loha(parts, weight, 1.0), weight)


PRODUCTS = [name for name in ALGORITHMS if not name.startswith(("glora", "ia3", "oft", "boft"))]


@pytest.mark.parametrize("name", PRODUCTS)
def test_an_analysis_measures_the_update_itself(name: str, tmp_path: Path) -> None:
    kind = ALGORITHMS[name].kinds[-1]
    shape = LAYERS[kind]
    tensors, parts = made(name, kind, "F32")
    file = write_safetensors(
        tmp_path / "x.safetensors", {f"{KEY}.{part}": value for part, value in tensors.items()}
    )
    zero = np.zeros(shape)
    delta = flat(new_weight(name, parts, zero))
    module = next(iter(lorafast.analyze(file).modules.values()))
    sigma = np.linalg.svd(delta, compute_uv=False)
    assert module.frobenius_norm == pytest.approx(np.linalg.norm(delta), rel=1e-6)
    found = np.array(module.singular_values)[: len(sigma)]
    assert np.allclose(found, sigma[: len(found)], atol=1e-6 * sigma[0])
    assert module.shape == (shape[0], wide(shape))
    if ("lokr_w1" not in tensors or "lokr_w2" not in tensors) and name != "full":
        assert module.rank == ALGORITHMS[name].rank
    fleet = lorafast.scan(tmp_path)
    assert len(fleet) == 1
    # The same update as one plain product: the same update.
    left, sizes, right = np.linalg.svd(delta, full_matrices=False)
    plain = {
        f"{KEY}.lora_down.weight": tensor(right.reshape(-1, *shape[1:])),
        f"{KEY}.lora_up.weight": tensor((left * sizes).reshape(shape[0], -1, *ones(shape))),
    }
    other = write_safetensors(tmp_path / "y.safetensors", plain)
    similarity = lorafast.similarity([file, other])
    assert similarity.matrix[0][1] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", ["glora", "ia3, inputs", "oft", "boft"])
def test_what_needs_the_base_is_blank_without_it(name: str, tmp_path: Path) -> None:
    tensors, _ = made(name, "linear", "F32")
    file = write_safetensors(
        tmp_path / "x.safetensors", {f"{KEY}.{part}": value for part, value in tensors.items()}
    )
    plain, _ = made("lora", "linear", "F32")
    other = write_safetensors(
        tmp_path / "y.safetensors", {f"{KEY}.{part}": value for part, value in plain.items()}
    )
    analysis = lorafast.analyze(file)
    assert len(analysis.modules) == 0
    assert any("base's whole weight" in feature for feature in analysis.summary["features"])
    lorafast.compare([file, other])
    assert len(lorafast.scan(tmp_path)) == 2
    base, _ = based(tmp_path / "base", (24, 20), "F32")
    with pytest.raises(lorafast.LorafastError, match="whole of the base's weight"):
        lorafast.subtract(base, file, tmp_path / "back")


def test_in_sequence_each_is_made_of_what_the_one_before_left(tmp_path: Path) -> None:
    base, weight = based(tmp_path / "base", (24, 20), "F32")
    files, expected = [], weight
    for name in ("glora", "lora", "oft"):
        tensors, parts = made(name, "linear", "F32")
        files.append(
            write_safetensors(
                tmp_path / f"{name}.safetensors",
                {f"{KEY}.{part}": value for part, value in tensors.items()},
            )
        )
        expected = new_weight(name, parts, expected)
    lorafast.merge(base, files, tmp_path / "out")
    close(read_checkpoint(tmp_path / "out")[f"{MODULE}.weight"], expected, weight)
    assert lorafast.verify(base, files, tmp_path / "out").ok
    pytest.importorskip("torch")
    lorafast.merge(base, files, tmp_path / "torch", device="torch:cpu")
    assert read_checkpoint(tmp_path / "torch") == read_checkpoint(tmp_path / "out")
    weighted = weight.copy()
    for name, share in zip(("glora", "lora", "oft"), (0.5, 0.25, 2.0), strict=True):
        _, parts = made(name, "linear", "F32")
        weighted += share * (new_weight(name, parts, weight) - weight)
    options: dict[str, Any] = {"strategy": "weighted", "weights": [0.5, 0.25, 2.0]}
    lorafast.merge(base, files, tmp_path / "weighted", **options)
    close(read_checkpoint(tmp_path / "weighted")[f"{MODULE}.weight"], weighted, weight)
    assert lorafast.verify(base, files, tmp_path / "weighted", **options).ok


@pytest.mark.parametrize("name", ["loha", "lokr, both whole", "glora", "ia3, inputs", "oft", DORA])
@pytest.mark.parametrize("kind", ["linear", "conv 3x3"])
def test_torch_and_loaded_modules_take_the_same(name: str, kind: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import lorafast.torch

    algorithm = "lora" if name == DORA else name
    shape = LAYERS[kind]
    tensors, parts = made(algorithm, kind, "F32")
    if name == DORA:
        tensors["dora_scale"] = tensor(1 + generator("torch").uniform(size=(1, 20, *ones(shape))))
        parts["dora_scale"] = tensors["dora_scale"].float64()
    base, weight = based(tmp_path / "base", shape, "F32")
    file = write_safetensors(
        tmp_path / "x.safetensors", {f"{KEY}.{part}": value for part, value in tensors.items()}
    )
    expected = new_weight(algorithm, parts, weight)
    lorafast.merge(base, file, tmp_path / "out", device="torch:cpu")
    close(read_checkpoint(tmp_path / "out")[f"{MODULE}.weight"], expected, weight)
    layer = torch.nn.Linear(20, 24, bias=False) if kind == "linear" else torch.nn.Conv2d(20, 24, 3)
    layer.weight.data.copy_(torch.tensor(weight))
    block = torch.nn.Module()
    block.layer = layer
    net = torch.nn.Module()
    net.down_blocks = torch.nn.ModuleList([block])
    lorafast.torch.merge_into(net, file)
    close(tensor(layer.weight.detach().double().numpy()), expected, weight)


def test_early_glora_has_its_pairs_the_other_way_round(tmp_path: Path) -> None:
    tensors, parts = made("glora", "linear", "F32")
    swapped = {f"{a}{b}.weight": tensors[f"{a}{c}.weight"] for a in "ab" for b, c in ("12", "21")}
    swapped["alpha"] = tensors["alpha"]
    merged, weight, _ = merge_parts(tmp_path, (24, 20), swapped)
    close(merged, new_weight("glora", parts, weight), weight)


BROKEN: dict[str, tuple[dict[str, tuple[int, ...] | float], str]] = {
    "loha without a factor": (
        {"hada_w1_a": (24, 3), "hada_w1_b": (3, 20), "hada_w2_a": (24, 3)},
        "not its other factors",
    ),
    "loha of two sizes": (
        {"hada_w1_a": (24, 3), "hada_w1_b": (3, 20), "hada_w2_a": (23, 3), "hada_w2_b": (3, 20)},
        "no factors of a LoHa",
    ),
    "loha with one core": (
        {
            "hada_w1_a": (3, 24),
            "hada_w1_b": (3, 20),
            "hada_t1": (3, 3, 1, 1),
            "hada_w2_a": (24, 3),
            "hada_w2_b": (3, 20),
        },
        "no factors of a LoHa",
    ),
    "lokr without w2": ({"lokr_w1": (4, 4)}, "not its lokr_w2"),
    "lokr with half a w2": ({"lokr_w1": (4, 4), "lokr_w2_a": (6, 2)}, "whole or two factors"),
    "lokr with w1 twice": (
        {"lokr_w1": (4, 4), "lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2": (6, 5)},
        "whole or two factors",
    ),
    "lokr that does not fit": ({"lokr_w1": (6, 4), "lokr_w2": (5, 4)}, r"shape \[30, 16\]"),
    # The number of elements alone would fit: 480.
    "lokr of the right size": ({"lokr_w1": (4, 6), "lokr_w2": (4, 5)}, r"shape \[16, 30\]"),
    "alpha of zero": (
        {"lokr_w1": (4, 4), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 5), "alpha": 0.0},
        f"{KEY}.alpha is 0",
    ),
    "alpha of infinity": (
        {"lokr_w1": (4, 4), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 5), "alpha": np.inf},
        "finite number",
    ),
    "two algorithms": (
        {"lora_down.weight": (4, 20), "lora_up.weight": (24, 4), "lokr_w1": (4, 4)},
        "a part of a LoRA, and .* a part of a LoKr",
    ),
    "a magnitude of another size": (
        {"lora_down.weight": (4, 20), "lora_up.weight": (24, 4), "dora_scale": (7, 1)},
        "neither the outputs",
    ),
    "a magnitude beside a difference": ({"diff": (24, 20), "dora_scale": (24, 1)}, "no magnitudes"),
    "a core that does not fit": (
        {"lora_down.weight": (4, 20), "lora_mid.weight": (3, 3, 1, 1), "lora_up.weight": (24, 4)},
        "no factors with a core",
    ),
    "blocks that are not square": ({"oft_blocks": (6, 4, 3)}, "no set of square blocks"),
    "butterflies that do not come out": ({"oft_blocks": (4, 6, 4, 4)}, "no set of square blocks"),
    "half an ia3": ({"on_input": 1.0}, "not its weight"),
    "a t-lora": ({"q_layer.weight": (4, 20), "p_layer.weight": (24, 4)}, "T-LoRA"),
    "a fork's flag": (
        {"lora_down.weight": (4, 20), "lora_up.weight": (24, 4), "bora_scale_r": (24,)},
        "bora_scale_r.*cannot be read",
    ),
    "a tensor of another program's": (
        {"lora_down.weight": (4, 20), "lora_up.weight": (24, 4), "lora_third": (24,)},
        "no part of an update that is known",
    ),
    # Four bytes a row in the file, and 10^12 of them in the product.
    "a lokr beyond any weight": (
        {"lokr_w1": (100_000, 1), "lokr_w2_a": (100_000, 1), "lokr_w2_b": (1, 1)},
        "expand to more than",
    ),
    "blocks of another size": ({"oft_blocks": (5, 4, 4)}, "the base's is"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_said_in_one_sentence(name: str, tmp_path: Path) -> None:
    parts, sentence = BROKEN[name]
    base, _ = based(tmp_path / "base", (24, 20), "F32")
    random = generator(name)
    tensors = {
        f"{KEY}.{part}": tensor(
            np.array(value) if isinstance(value, float) else random.normal(size=value), "F16"
        )
        for part, value in parts.items()
    }
    file = write_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(lorafast.LorafastError, match=sentence) as raised:
        lorafast.merge(base, file, tmp_path / "out")
    assert str(file) in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_packed_embeddings_are_left_out_by_name_alone(tmp_path: Path) -> None:
    base, weight = based(tmp_path / "base", (24, 20), "F32")
    tensors, parts = made("lora", "linear", "F32")
    file = {f"{KEY}.{part}": value for part, value in tensors.items()}
    file["bundle_emb.style.string_to_param.*"] = tensor(np.ones((2, 20)))
    adapter = write_safetensors(tmp_path / "x.safetensors", file)
    with pytest.raises(lorafast.LorafastError, match="embeddings of a textual inversion"):
        lorafast.merge(base, adapter, tmp_path / "out")
    lorafast.merge(base, adapter, tmp_path / "out", allow=["bundle_emb"])
    merged = read_checkpoint(tmp_path / "out")[f"{MODULE}.weight"]
    close(merged, new_weight("lora", parts, weight), weight)


# PEFT's own.


def peft_directory(path: Path, kind: str, tensors: Mapping[str, Tensor], **settings: Any) -> Path:
    path.mkdir()
    config = {"peft_type": kind, "r": 4, "alpha": 6, "target_modules": ["layer"], **settings}
    (path / "adapter_config.json").write_text(json.dumps(config))
    prefix = f"base_model.model.{MODULE}"
    named = {f"{prefix}.{part}": value for part, value in tensors.items() if part != "alpha"}
    write_safetensors(path / "adapter_model.safetensors", named)
    return path


@pytest.mark.parametrize(
    # Both factors of a LoKr have one rank there.
    "name",
    [name for name in ALGORITHMS if name.startswith(("loha", "lokr")) and "both in" not in name],
)
@pytest.mark.parametrize("kind", ["linear", "conv 3x3"])
def test_peft_scales_by_its_config(name: str, kind: str, tmp_path: Path) -> None:
    algorithm = ALGORITHMS[name]
    if kind not in algorithm.kinds:
        pytest.skip("no layer of this algorithm's")
    tensors, parts = made(name, kind, "F32")
    base, weight = based(tmp_path / "base", LAYERS[kind], "F32")
    method = "LOHA" if name.startswith("loha") else "LOKR"
    adapter = peft_directory(
        tmp_path / "peft", method, tensors, r=algorithm.rank, alpha_pattern={"layer": 5.0}
    )
    lorafast.merge(base, adapter, tmp_path / "out")
    # Whether both factors are whole or not.
    scale = 5.0 / algorithm.rank
    delta = algorithm.formula(parts, weight, scale)
    if "lokr_w1" in parts and "lokr_w2" in parts:
        delta = scale * delta
    merged = read_checkpoint(tmp_path / "out")[f"{MODULE}.weight"]
    close(merged, weight + delta, weight)
    assert lorafast.verify(base, adapter, tmp_path / "out").ok
    module = lorafast.inspect(adapter)["adapter"]["modules"][0]
    assert (module["rank"], module["alpha"], module["scaling"]) == (algorithm.rank, 5.0, scale)


def test_ranks_that_the_config_does_not_have_are_refused(tmp_path: Path) -> None:
    tensors, _ = made("loha", "linear", "F32")
    base, _ = based(tmp_path / "base", LAYERS["linear"], "F32")
    adapter = peft_directory(tmp_path / "peft", "LOHA", tensors, r=5)
    with pytest.raises(lorafast.AdapterError, match="do not belong together"):
        lorafast.merge(base, adapter, tmp_path / "out")
    other = peft_directory(tmp_path / "other", "LOKR", tensors, r=3)
    with pytest.raises(lorafast.AdapterError, match="no part of a LOKR"):
        lorafast.merge(base, other, tmp_path / "out")


def model(torch: Any) -> Any:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(12, 16)
            self.square = torch.nn.Linear(16, 16)
            self.conv = torch.nn.Conv2d(4, 8, 3, padding=1)
            self.point = torch.nn.Conv2d(8, 4, 1)

        def forward(self, x: Any) -> Any:
            x = self.square(self.first(x)).reshape(-1, 4, 2, 2)
            return self.point(self.conv(x))

    torch.manual_seed(7)
    return Net()


def peft_configs() -> dict[str, Callable[[Any], Any]]:
    targets = ["first", "square", "conv", "point"]
    return {
        "loha": lambda peft: peft.LoHaConfig(r=4, alpha=6, target_modules=targets),
        "loha, effective": lambda peft: peft.LoHaConfig(
            r=4, alpha=6, target_modules=targets, use_effective_conv2d=True
        ),
        "lokr": lambda peft: peft.LoKrConfig(r=2, alpha=6, target_modules=targets),
        "lokr, effective": lambda peft: peft.LoKrConfig(
            r=2, alpha=6, target_modules=targets, use_effective_conv2d=True
        ),
        "lokr, both": lambda peft: peft.LoKrConfig(
            r=1, alpha=3, target_modules=targets, decompose_both=True, rank_pattern={"conv": 2}
        ),
        "lokr, whole": lambda peft: peft.LoKrConfig(r=64, alpha=16, target_modules=targets),
        "ia3": lambda peft: peft.IA3Config(
            target_modules=targets, feedforward_modules=["square", "point"]
        ),
        "ia3, pattern": lambda peft: peft.IA3Config(
            target_modules=targets, feedforward_modules=".*(square|conv)"
        ),
    }


@pytest.mark.parametrize("name", peft_configs())
def test_a_merge_is_what_peft_makes(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    net = model(torch)
    base = tmp_path / "base"
    base.mkdir()
    values = {
        key: tensor(value.detach().double().numpy()) for key, value in net.state_dict().items()
    }
    write_safetensors(base / "model.safetensors", values)
    (base / "config.json").write_text('{"model_type": "x", "torch_dtype": "float32"}')
    wrapped = peft.get_peft_model(net, peft_configs()[name](peft))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = wrapped.merge_and_unload().state_dict()
    lorafast.merge(base, tmp_path / "adapter", tmp_path / "out")
    merged = read_checkpoint(tmp_path / "out")
    for key, value in expected.items():
        difference = np.abs(merged[key].float64() - value.detach().double().numpy()).max()
        assert difference < 3e-6, (key, difference)
    assert not np.array_equal(merged["first.weight"].float64(), values["first.weight"].float64())
    assert lorafast.verify(base, tmp_path / "adapter", tmp_path / "out").ok


LYCORIS: dict[str, dict[str, Any]] = {
    "locon": {"algo": "locon"},
    "locon, tucker": {"algo": "locon", "use_tucker": True},
    "loha": {"algo": "loha"},
    "loha, tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr, tucker": {"algo": "lokr", "factor": 4, "use_tucker": True},
    "lokr, whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr, both": {
        "algo": "lokr",
        "factor": 4,
        "decompose_both": True,
        "linear_dim": 1,
        "conv_dim": 1,
    },
    "full": {"algo": "full"},
    "dora": {"algo": "locon", "dora_wd": True},
    "dora of inputs": {"algo": "locon", "dora_wd": True, "wd_on_output": False},
    "diag-oft": {"algo": "diag-oft", "linear_dim": 4, "conv_dim": 2},
    "boft": {"algo": "boft", "linear_dim": 4, "conv_dim": 4},
    "glora": {"algo": "glora"},
    "ia3": {"algo": "ia3"},
}


@pytest.mark.parametrize("name", LYCORIS)
def test_a_merge_is_what_lycoris_computes(name: str, tmp_path: Path) -> None:
    """Against the forward pass, which is what was trained; LyCORIS's merge scales LoHa twice."""
    torch = pytest.importorskip("torch")
    lycoris = pytest.importorskip("lycoris")
    settings = {"linear_dim": 2, "linear_alpha": 3.0, "conv_dim": 2, "conv_alpha": 3.0} | LYCORIS[
        name
    ]
    if name in {"diag-oft", "boft"}:
        settings |= {"linear_alpha": 0.0, "conv_alpha": 0.0}
    net = model(torch)
    base = tmp_path / "base"
    base.mkdir()
    values = {
        key: tensor(value.detach().double().numpy()) for key, value in net.state_dict().items()
    }
    write_safetensors(base / "model.safetensors", values)
    (base / "config.json").write_text('{"model_type": "x", "torch_dtype": "float32"}')
    algo = settings.pop("algo")
    network = lycoris.create_lycoris(net, 1.0, algo=algo, **settings)
    network.apply_to()
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "dora_scale" in key:
                parameter.mul_(1.25)
            elif "scalar" not in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    stored = {
        key: tensor(np.asarray(value.detach().double().numpy()))
        for key, value in network.state_dict().items()
    }
    file = write_safetensors(tmp_path / "x.safetensors", stored)
    inputs = torch.randn(5, 12)
    with torch.no_grad():
        expected = net(inputs)
    lorafast.merge(base, file, tmp_path / "out")
    merged = {
        key: torch.tensor(value.float64()).float()
        for key, value in read_checkpoint(tmp_path / "out").items()
    }
    fresh = model(torch)
    fresh.load_state_dict(merged)
    with torch.no_grad():
        actual = fresh(inputs)
        untouched = model(torch)(inputs)
    assert (actual - expected).abs().max() < 2e-5 * expected.abs().max().clamp(min=1)
    assert (actual - untouched).abs().max() > 1e-3
    assert lorafast.verify(base, file, tmp_path / "out").ok


# Of others.


@pytest.mark.real_data
@pytest.mark.parametrize("rank", [4, 8])
def test_the_first_lokr_files_merge_into_a_model_of_their_shapes(
    rank: int, real_data: Path, tmp_path: Path
) -> None:
    found = list(real_data.glob(f"adapters/lycoris_lokr__*/*_{rank}_lokr.safetensors"))
    if not found:
        pytest.skip("the files are not here")
    (file,) = found
    listing = lorafast.inspect(file)["adapter"]
    assert (listing["type"], listing["r"]) == ("LOKR", rank)
    modules = listing["modules"]
    assert len(modules) == 350
    assert all(use["use"] == "used" for use in listing["coverage"]["tensors"])
    analysis = lorafast.analyze(file)
    assert all(np.isfinite(module.frobenius_norm) for module in analysis.modules.values())
    # A base of the modules' own names, a convolution of 3 by 3 among them.
    few = [modules[0], modules[100], next(one for one in modules if one["shape"][1] == 320 * 9)]
    weights = {}
    for module in few:
        rows, columns = module["shape"]
        shape = (rows, columns // 9, 3, 3) if columns == 320 * 9 else (rows, columns)
        weights[f"{module['name']}.weight"] = tensor(generator(module["name"]).normal(size=shape))
    kept = {
        name: value
        for name, value in read_safetensors(file).items()
        if any(name.startswith(f"{module['name']}.") for module in few)
    }
    cut = write_safetensors(tmp_path / "cut.safetensors", kept)
    base = make_base(tmp_path / "base", modules={}, others=weights, config={"model_type": "x"})
    lorafast.merge(base, cut, tmp_path / "out")
    merged = read_checkpoint(tmp_path / "out")
    for name, value in weights.items():
        key = name.removesuffix(".weight")
        parts = {
            part.removeprefix(f"{key}."): one.float64()
            for part, one in kept.items()
            if part.startswith(f"{key}.")
        }
        scale = float(parts["alpha"]) / rank
        start = value.float64()
        close(merged[name], start + lokr(parts, start, scale), start)


@pytest.mark.real_data
def test_an_ia3_adapter_of_2023_scales_its_outputs(real_data: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    found = list(real_data.glob("adapters/peft_repo__2023-08-07*"))
    if not found:
        pytest.skip("the adapter is not here")
    (folder,) = found
    state = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    few = list(state)[:3]
    vectors = {
        key.removeprefix("base_model.model.").removesuffix(".ia3_l"): state[key] for key in few
    }
    weights = {
        f"{path}.weight": tensor(generator(path).normal(size=(len(vector), 8)))
        for path, vector in vectors.items()
    }
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    torch.save({key: state[key] for key in few}, adapter / "adapter_model.bin")
    (adapter / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    base = make_base(tmp_path / "base", modules={}, others=weights, config={"model_type": "t5"})
    lorafast.merge(base, adapter, tmp_path / "out")
    merged = read_checkpoint(tmp_path / "out")
    for path, vector in vectors.items():
        start = weights[f"{path}.weight"].float64()
        close(merged[f"{path}.weight"], start * vector.double().numpy().reshape(-1, 1), start)
    modules = lorafast.inspect(folder)["adapter"]["modules"]
    assert len(modules) == len(state)
