"""Quantised checkpoints made and read by NumPy: an independent account of every scheme.

A weight is a code's value times the scale of its block. What a scheme is, is which values there
are, which elements form a block, and how the scales are rounded and stored:

    DeepSeek-V3, Qwen3-FP8    E4M3, blocks of 128 x 128, scales max|W| / 448 (or a power of two)
    compressed-tensors        E4M3, a row or the whole tensor
    bitsandbytes NF4, FP4     16 values, runs of 64 elements of the flattened weight, max|W|; those
                              scales may be quantised again, in runs of 256, after their mean is
                              taken off
    bitsandbytes int8         -127 .. 127 in 127ths, a row
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from support.files import Tensor, narrow, tensor, widen

Float64 = NDArray[np.float64]


def minifloat(exponent_bits: int, mantissa_bits: int, *, infinities: bool) -> Float64:
    """The value of each code of an 8-bit float."""
    codes = np.arange(256)
    bias = 2 ** (exponent_bits - 1) - 1
    exponent = (codes >> mantissa_bits) & (2**exponent_bits - 1)
    fraction = (codes & (2**mantissa_bits - 1)) / 2**mantissa_bits
    values = np.where(
        exponent == 0,
        fraction * 2.0 ** (1 - bias),
        (1 + fraction) * 2.0 ** (exponent - bias),
    )
    special = exponent == 2**exponent_bits - 1
    if not infinities:
        special &= fraction == fraction.max()
    return np.where(special, np.nan, np.where(codes >= 128, -values, values))


E4M3 = minifloat(4, 3, infinities=False)
E5M2 = minifloat(5, 2, infinities=True)
INT8 = np.arange(256).astype(np.uint8).view(np.int8) / 127.0


def normal_floats() -> Float64:
    """NF4: 16 quantiles of the normal distribution, zero among them (Dettmers et al. 2023)."""
    tail = 0.9677083
    above = norm.ppf(np.linspace(tail, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(tail, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([above, [0.0], below]))
    return (values / np.abs(values).max()).astype(np.float32).astype(np.float64)


def four_bit_floats() -> Float64:
    """FP4: a sign, two bits of exponent and one of mantissa, in units of the largest."""
    positive = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    return np.concatenate([positive, -positive]).astype(np.float32).astype(np.float64)


def dynamic_floats() -> Float64:
    """The 256 values of the dynamic exponent (Dettmers 2015): decades, ever more finely split."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2**decade + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [*middles, *-middles]
    return np.sort(np.array(values)).astype(np.float32).astype(np.float64)


def grid_of(shape: tuple[int, ...], block: tuple[int, int]) -> NDArray[np.int64]:
    """The block of each element of a matrix, numbered row after row."""
    rows, columns = shape
    across = math.ceil(columns / block[1])
    return (np.arange(rows) // block[0])[:, None] * across + np.arange(columns) // block[1]


def runs_of(shape: tuple[int, ...], length: int) -> NDArray[np.int64]:
    return (np.arange(math.prod(shape)) // length).reshape(shape)


@dataclass(frozen=True)
class Scheme:
    """One way of storing weights.

    Attributes:
        name: for the tests' names.
        config: the config's `quantization_config`.
        table: the value of each code.
        largest: the value that a block's largest weight is stored as.
        blocks: the block of each element, from the shape.
        round_scale: what is stored for a scale.
        store: the tensors of a weight of that name, from its codes, scales and shape.
        load: the codes and the scales (before and after they were quantised themselves) from the
            tensors of a checkpoint, the weight's name and its shape.
    """

    name: str
    config: Mapping[str, Any]
    table: Float64
    largest: float
    blocks: Callable[[tuple[int, ...]], NDArray[np.int64]]
    round_scale: Callable[[Float64], Float64]
    store: Callable[[str, NDArray[np.uint8], Float64, tuple[int, ...]], dict[str, Tensor]]
    load: Callable[[Mapping[str, Tensor], str, tuple[int, ...]], tuple[NDArray[np.uint8], Float64]]

    def scales_for(self, weight: Float64) -> Float64:
        """The right scale of each block, rounded as it is stored."""
        blocks = self.blocks(weight.shape)
        largest = np.zeros(blocks.max() + 1)
        np.maximum.at(largest, blocks.ravel(), np.abs(weight).ravel())
        return self.round_scale(largest / self.largest)

    def nearest(self, weight: Float64, scales: Float64) -> NDArray[np.uint8]:
        """The code nearest to each element, by looking at all of them."""
        unit = scales[self.blocks(weight.shape)]
        scaled = np.where(unit == 0, 0, weight / np.where(unit == 0, 1, unit))
        codes = np.flatnonzero(np.isfinite(self.table))
        order = codes[np.argsort(self.table[codes], kind="stable")]
        values = self.table[order]
        above = np.clip(np.searchsorted(values, scaled), 1, len(values) - 1)
        lower_is_nearer = scaled - values[above - 1] <= values[above] - scaled
        return order[np.where(lower_is_nearer, above - 1, above)].astype(np.uint8)

    def quantise(self, name: str, weight: Float64) -> dict[str, Tensor]:
        scales = self.scales_for(weight)
        return self.store(name, self.nearest(weight, scales), scales, weight.shape)

    def dequantise(
        self, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]
    ) -> Float64:
        """The weight as float32 has it."""
        codes, scales = self.load(tensors, name, shape)
        exact = self.table[codes].reshape(shape) * scales[self.blocks(shape)]
        return exact.astype(np.float32).astype(np.float64)


def float32(scale: Float64) -> Float64:
    return scale.astype(np.float32).astype(np.float64)


def power_of_two(scale: Float64) -> Float64:
    return np.asarray(2.0 ** np.ceil(np.log2(np.maximum(scale, 2.0**-126))))


def bfloat16(scale: Float64) -> Float64:
    return widen("BF16", narrow(scale, "BF16")).reshape(scale.shape)


def _raw(dtype: str, values: NDArray[np.uint8]) -> Tensor:
    return Tensor(dtype, values.shape, values.tobytes())


def fp8(
    name: str,
    block: tuple[int, int] | None,
    *,
    scale_shape: Callable[[tuple[int, int]], tuple[int, ...]],
    ending: str = "_scale_inv",
    scale_dtype: str = "F32",
    powers: bool = False,
    five: bool = False,
    config: Mapping[str, Any] | None = None,
) -> Scheme:
    """8-bit floats with a scale for each block (`None`: the whole tensor)."""
    kind = "F8_E5M2" if five else "F8_E4M3"

    def store(
        name: str, codes: NDArray[np.uint8], scales: Float64, shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        rows, columns = shape
        if scale_dtype == "F8_E8M0":
            stored = _raw("F8_E8M0", (np.log2(scales) + 127).astype(np.uint8))
        else:
            stored = tensor(scales, scale_dtype)
        stored = Tensor(stored.dtype, scale_shape((rows, columns)), stored.data)
        return {name: _raw(kind, codes.reshape(shape)), name + ending: stored}

    def load(
        tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]
    ) -> tuple[NDArray[np.uint8], Float64]:
        assert tensors[name].dtype == kind
        assert tensors[name].shape == shape
        stored = tensors[name + ending]
        assert stored.dtype == scale_dtype
        if scale_dtype == "F8_E8M0":
            scales = 2.0 ** (np.frombuffer(stored.data, np.uint8).astype(np.float64) - 127)
        else:
            scales = stored.float64().ravel()
        return np.frombuffer(tensors[name].data, np.uint8), scales

    def blocks(shape: tuple[int, ...]) -> NDArray[np.int64]:
        rows, columns = shape
        size = block or shape
        return grid_of(shape, (min(size[0], rows), min(size[1], columns)))

    rounding = power_of_two if powers else bfloat16 if scale_dtype == "BF16" else float32
    return Scheme(
        name,
        config or {"quant_method": "fp8", "weight_block_size": [128, 128]},
        E5M2 if five else E4M3,
        57344.0 if five else 448.0,
        blocks,
        rounding,
        store,
        load,
    )


def four_bit(kind: str, *, nested: bool, storage: str = "U8", length: int = 64) -> Scheme:
    """bitsandbytes' 4 bits as transformers saves them."""
    table = normal_floats() if kind == "nf4" else four_bit_floats()
    dynamic = dynamic_floats()

    def store(
        name: str, codes: NDArray[np.uint8], scales: Float64, shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        flat = codes.ravel()
        flat = np.concatenate([flat, np.zeros(flat.size % 2, np.uint8)])
        packed = (flat[::2] << 4 | flat[1::2]).astype(np.uint8)
        size = {"U8": 1, "BF16": 2}[storage]
        state: dict[str, Any] = {
            "quant_type": kind,
            "blocksize": length,
            "dtype": "bfloat16",
            "shape": list(shape),
        }
        tensors = {
            name: Tensor(storage, (packed.size // size, 1), packed.tobytes()),
            f"{name}.quant_map": tensor(table),
        }
        if nested:
            offset = float(np.float32(scales.mean()))
            rest = float32(scales - offset)
            runs = np.arange(scales.size) // 256
            outer = np.zeros(runs.max() + 1)
            np.maximum.at(outer, runs, np.abs(rest))
            distance = np.abs(rest[:, None] / outer[runs][:, None] - dynamic)
            tensors[f"{name}.absmax"] = _raw("U8", distance.argmin(axis=1).astype(np.uint8))
            tensors[f"{name}.nested_absmax"] = tensor(outer)
            tensors[f"{name}.nested_quant_map"] = tensor(dynamic)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        else:
            tensors[f"{name}.absmax"] = tensor(scales)
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        tensors[f"{name}.quant_state.bitsandbytes__{kind}"] = _raw("U8", text)
        return tensors

    def load(
        tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]
    ) -> tuple[NDArray[np.uint8], Float64]:
        assert tensors[name].dtype == storage
        packed = np.frombuffer(tensors[name].data, np.uint8)
        codes = np.stack([packed >> 4, packed & 15], axis=1).ravel()[: math.prod(shape)]
        state = json.loads(tensors[f"{name}.quant_state.bitsandbytes__{kind}"].data)
        assert tuple(state["shape"]) == shape
        absmax = tensors[f"{name}.absmax"]
        if not nested:
            return codes, absmax.float64()
        outer = tensors[f"{name}.nested_absmax"].float64()
        inner = dynamic[np.frombuffer(absmax.data, np.uint8)]
        runs = np.arange(inner.size) // state["nested_blocksize"]
        return codes, float32(float32(inner * outer[runs]) + np.float32(state["nested_offset"]))

    return Scheme(
        kind + ("-nested" if nested else "") + ("" if storage == "U8" else f"-{storage}"),
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        table,
        1.0,
        lambda shape: runs_of(shape, length),
        float32,
        store,
        load,
    )


def int8() -> Scheme:
    """bitsandbytes' int8 as transformers saves it."""

    def store(
        name: str, codes: NDArray[np.uint8], scales: Float64, shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        module = name.removesuffix(".weight")
        return {
            name: _raw("I8", codes.reshape(shape)),
            f"{module}.SCB": tensor(scales),
            f"{module}.weight_format": _raw("U8", np.zeros((), np.uint8)),
        }

    def load(
        tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]
    ) -> tuple[NDArray[np.uint8], Float64]:
        assert tensors[name].shape == shape
        scales = tensors[name.removesuffix(".weight") + ".SCB"].float64()
        return np.frombuffer(tensors[name].data, np.uint8), scales

    return Scheme(
        "int8",
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        np.where(np.arange(256) == 128, np.nan, INT8),
        1.0,
        lambda shape: grid_of(shape, (1, shape[1])),
        float32,
        store,
        load,
    )


def _tiles(shape: tuple[int, int]) -> tuple[int, ...]:
    return (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))


COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
UE8M0 = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}

SCHEMES = [
    fp8("fp8-blocks", (128, 128), scale_shape=_tiles),
    fp8("fp8-blocks-powers", (128, 128), scale_shape=_tiles, powers=True, config=UE8M0),
    fp8(
        "fp8-blocks-exponents",
        (128, 128),
        scale_shape=_tiles,
        scale_dtype="F8_E8M0",
        powers=True,
        config=UE8M0,
    ),
    fp8("fp8-tensor", None, scale_shape=lambda _: (), ending="_scale", config=COMPRESSED),
    fp8(
        "fp8-tensor-e5m2", None, scale_shape=lambda _: (1,), five=True, config={"quant_method": "x"}
    ),
    fp8(
        "fp8-rows",
        (1, 1 << 30),
        scale_shape=lambda shape: (shape[0], 1),
        ending="_scale",
        scale_dtype="BF16",
        config=COMPRESSED,
    ),
    four_bit("nf4", nested=False),
    four_bit("nf4", nested=True),
    four_bit("fp4", nested=True),
    four_bit("nf4", nested=False, storage="BF16"),
    int8(),
]
