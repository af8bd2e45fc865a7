"""Weights as compressed-tensors, ModelOpt and gpt-oss pack them, made and read by NumPy.

NVFP4 (compressed-tensors)  weight_packed: two E2M1 to a byte, the first in the lower half;
                            weight_scale: E4M3 for 16 weights, divided by weight_global_scale
NVFP4 (ModelOpt)            the same under `weight`, the scales multiplied by weight_scale_2
MXFP4 (compressed-tensors)  weight_scale: the exponent of a power of two, plus 127, for 32 weights
int8 (int-quantized)        weight: int8; weight_scale for a row, the tensor or a group
int4, int8 (pack-quantized) weight_packed: words of 32 bits, each integer plus 8 or 128, the first
                            one in the lowest bits; weight_shape
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.files import Tensor, tensor
from support.quantised import (
    E4M3,
    Float64,
    Scheme,
    bfloat16,
    float32,
    grid_of,
    power_of_two,
)

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
CODES = NDArray[np.uint8]
GROUPS: dict[str, Any] = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}}}


def pack_halves(codes: CODES) -> CODES:
    flat = codes.reshape(*codes.shape[:-1], -1, 2)
    return (flat[..., 0] | flat[..., 1] << 4).astype(np.uint8)


def unpack_halves(packed: CODES) -> CODES:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def nearest_e4m3(values: Float64) -> CODES:
    """The nearest positive codes, 1 at the least."""
    table = E4M3[:127]
    above = np.clip(np.searchsorted(table, values), 1, 126)
    lower = values - table[above - 1] <= table[above] - values
    return np.maximum(np.where(lower, above - 1, above), 1).astype(np.uint8)


def _raw(dtype: str, values: NDArray[Any]) -> Tensor:
    return Tensor(dtype, values.shape, np.ascontiguousarray(values).tobytes())


def nvfp4(unit: float, *, modelopt: bool = False) -> Scheme:
    """`unit` is what each scale is multiplied by."""
    number = np.float64(np.float32(unit if modelopt else 1 / unit))
    factor = number if modelopt else 1 / number

    def stored(scale: Float64) -> CODES:
        return nearest_e4m3(scale / factor)

    def store(
        name: str, codes: CODES, scales: Float64, shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        packed = _raw("U8", pack_halves(codes.reshape(shape)))
        scale = stored(scales).reshape(shape[0], -1)
        tensors = {
            name if modelopt else f"{name}_packed": packed,
            f"{name}_scale": _raw("F8_E4M3", scale),
        }
        if modelopt:
            return tensors | {f"{name}_scale_2": tensor(number)}
        return tensors | {f"{name}_global_scale": tensor(number.reshape(1))}

    def load(
        tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]
    ) -> tuple[CODES, Float64]:
        packed = tensors[name if modelopt else f"{name}_packed"]
        assert (packed.dtype, packed.shape) == ("U8", (shape[0], shape[1] // 2))
        scale = tensors[f"{name}_scale"]
        assert (scale.dtype, scale.shape) == ("F8_E4M3", (shape[0], shape[1] // 16))
        codes = unpack_halves(np.frombuffer(packed.data, np.uint8).reshape(packed.shape))
        scales = E4M3[np.frombuffer(scale.data, np.uint8)]
        return codes.ravel(), float32(scales * factor)

    return Scheme(
        "nvfp4-modelopt" if modelopt else "nvfp4",
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}
        if modelopt
        else {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        E2M1,
        6.0,
        lambda shape: grid_of(shape, (1, 16)),
        lambda scale: float32(E4M3[stored(scale)] * factor),
        store,
        load,
    )


def mxfp4() -> Scheme:
    def store(
        name: str, codes: CODES, scales: Float64, shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        exponents = (np.log2(scales) + 127).astype(np.uint8)
        return {
            f"{name}_packed": _raw("U8", pack_halves(codes.reshape(shape))),
            f"{name}_scale": _raw("U8", exponents.reshape(shape[0], -1)),
        }

    def load(
        tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]
    ) -> tuple[CODES, Float64]:
        packed = np.frombuffer(tensors[f"{name}_packed"].data, np.uint8)
        exponents = np.frombuffer(tensors[f"{name}_scale"].data, np.uint8).astype(np.float64)
        return unpack_halves(packed), 2.0 ** (exponents - 127)

    return Scheme(
        "mxfp4-packed",
        {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
        E2M1,
        6.0,
        lambda shape: grid_of(shape, (1, 32)),
        power_of_two,
        store,
        load,
    )


def integers(
    name: str, block: tuple[int, int] | None, *, bits: int = 8, words: bool = False
) -> Scheme:
    """A scale for each block (`None`: the whole tensor); `words` packs them."""
    offset = 2 ** (bits - 1)
    numbers = np.arange(2**bits) - offset if words else np.arange(256).astype(np.int8)
    dtype = "BF16" if block == (1, 1 << 30) else "F32"

    def size(shape: tuple[int, ...]) -> tuple[int, int]:
        wanted = block or (shape[0], shape[1])
        return min(wanted[0], shape[0]), min(wanted[1], shape[1])

    def store(
        name: str, codes: CODES, scales: Float64, shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        high, wide = size(shape)
        grid = (shape[0] // high, shape[1] // wide)
        scale = tensor(scales.reshape((1,) if block is None else grid), dtype)
        if not words:
            return {name: _raw("I8", codes.reshape(shape)), f"{name}_scale": scale}
        lined = codes.reshape(shape)
        packed = (lined if bits == 8 else pack_halves(lined)).view(np.int32)
        extents = tensor(np.array(shape), "I64")
        return {
            f"{name}_packed": _raw("I32", packed),
            f"{name}_scale": scale,
            f"{name}_shape": extents,
        }

    def load(
        tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]
    ) -> tuple[CODES, Float64]:
        stored = tensors[f"{name}_packed" if words else name]
        raw = np.frombuffer(stored.data, np.uint8)
        scales = tensors[f"{name}_scale"].float64().ravel()
        return unpack_halves(raw) if bits == 4 else raw, scales

    group: dict[str, Any] = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": "int"}}
    return Scheme(
        name,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized" if words else "int-quantized",
            "config_groups": {"group_0": group},
        },
        numbers.astype(np.float64),
        (2**bits - 1) / 2,
        lambda shape: grid_of(shape, size(shape)),
        bfloat16 if dtype == "BF16" else float32,
        store,
        load,
    )


PACKED = [
    nvfp4(1 / 1000),
    nvfp4(1 / 700, modelopt=True),
    mxfp4(),
    integers("int8-rows", (1, 1 << 30)),
    integers("int8-tensor", None),
    integers("int8-groups", (1, 32)),
    integers("int8-words", (1, 1 << 30), words=True),
    integers("int4-words-groups", (1, 32), bits=4, words=True),
]


def pack_experts(weight: Float64) -> tuple[Tensor, Tensor]:
    """gpt-oss' blocks and scales of (experts, outputs, inputs), as triton's kernels make them."""
    experts, outputs, inputs = weight.shape
    runs = weight.reshape(experts, outputs, inputs // 32, 32)
    largest = np.abs(runs).max(axis=-1)
    scale = 2.0 ** np.ceil(np.log2(np.maximum(largest / 6, 2.0**-126)))
    scaled = runs / scale[..., None]
    middles = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    size = np.abs(scaled)[..., None]
    # Ties go to the even code.
    above = np.where(np.arange(7) % 2 == 0, size > middles, size >= middles).sum(axis=-1)
    codes = (above | np.where(scaled < 0, 8, 0)).astype(np.uint8)
    blocks = pack_halves(codes)
    exponents = (np.log2(scale) + 127).astype(np.uint8)
    return _raw("U8", blocks), _raw("U8", exponents)


def unpack_experts(blocks: Tensor, scales: Tensor) -> Float64:
    """(experts, outputs, inputs)."""
    experts, outputs, runs, sixteen = blocks.shape
    assert sixteen == 16
    assert scales.shape == blocks.shape[:3]
    codes = unpack_halves(np.frombuffer(blocks.data, np.uint8).reshape(blocks.shape))
    exponents = np.frombuffer(scales.data, np.uint8).astype(np.float64).reshape(scales.shape)
    values: Float64 = E2M1[codes] * 2.0 ** (exponents[..., None] - 127)
    return values.reshape(experts, outputs, runs * 32)
