"""Formulas of LyCORIS's and PEFT's algorithms in float64, and random parts for a layer of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from support.files import Tensor, narrow, tensor, widen
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
    "embedding": (24, 20),
    "norm": (20,),
}
WEIGHTS = ("linear", "square", "tall", "conv 1x1", "conv 3x3")
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


def of_tokens(parts: Parts, weight: Array, s: float) -> Array:
    """Of an embedding, stored (tokens, width) and trained as a layer from tokens to width."""
    return s * (parts["lora_up.weight"] @ parts["lora_down.weight"]).T


def full(parts: Parts, weight: Array, s: float) -> Array:
    return parts["diff"]


def replaced(parts: Parts, weight: Array, s: float) -> Array:
    return parts["whole"] - weight


@dataclass(frozen=True)
class Algorithm:
    """How the parts of a layer are made, and the formula."""

    parts: Callable[[tuple[int, ...]], Mapping[str, tuple[int, ...]]]
    formula: Callable[[Parts, Array, float], Array]
    #: The rank as trainers call it, which the scale divides by.
    rank: int = 1
    kinds: tuple[str, ...] = WEIGHTS
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
    "lora, of tokens": Algorithm(
        lambda s: {"lora_down.weight": (4, s[0]), "lora_up.weight": (s[1], 4)},
        of_tokens,
        4,
        kinds=("embedding",),
    ),
    "dora": Algorithm(
        lambda s: {
            "lora_down.weight": (4, *s[1:]),
            "lora_up.weight": (s[0], 4, *ones(s)),
            "dora_scale": (s[0], 1, *ones(s)),
        },
        low_rank,
        4,
    ),
    "dora, inputs": Algorithm(
        lambda s: {
            "lora_down.weight": (4, *s[1:]),
            "lora_up.weight": (s[0], 4, *ones(s)),
            "dora_scale": (1, s[1], *ones(s)),
        },
        low_rank,
        4,
    ),
    "dora, of tokens": Algorithm(
        lambda s: {
            "lora_down.weight": (4, s[0]),
            "lora_up.weight": (s[1], 4),
            "dora_scale": (1, s[1]),
        },
        of_tokens,
        4,
        kinds=("embedding",),
    ),
    "dora, for each token": Algorithm(
        lambda s: {
            "lora_down.weight": (4, s[0]),
            "lora_up.weight": (s[1], 4),
            "dora_scale": (s[0], 1),
        },
        of_tokens,
        4,
        kinds=("embedding",),
    ),
    "full": Algorithm(
        lambda s: {"diff": s}, full, scaled=False, alpha=None, kinds=("embedding", "norm", *WEIGHTS)
    ),
    "whole": Algorithm(
        lambda s: {"whole": s},
        replaced,
        scaled=False,
        alpha=None,
        kinds=("linear", "conv 1x1", "conv 3x3", "embedding", "norm"),
    ),
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
    if "dora_scale" in parts:
        parts["dora_scale"] = 1 + np.abs(parts["dora_scale"])
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
