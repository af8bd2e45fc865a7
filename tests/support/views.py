"""Merged views held against what file merges write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lorafast
import torch

from support.files import Tensor

#: Torch's dtypes of safetensors' names, as far as tests have them.
TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def raw(tensor: Any) -> bytes:
    """The bytes of a tensor of torch, row-major."""
    plain = tensor.contiguous().reshape(-1)
    content: bytes = plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return content


def from_file(tensor: Tensor) -> torch.Tensor:
    """A tensor as it stands in a file, as torch has it."""
    if not tensor.data:
        return torch.empty(tensor.shape, dtype=TORCH[tensor.dtype])
    flat = torch.frombuffer(bytearray(tensor.data), dtype=torch.uint8)
    return flat.view(TORCH[tensor.dtype]).reshape(tensor.shape)


def assert_tensor(found: Any, expected: Tensor, name: str) -> None:
    assert found.dtype == TORCH[expected.dtype], name
    assert tuple(found.shape) == expected.shape, name
    assert raw(found) == expected.data, f"{name}: other bytes than the file's"


def parts_of(shape: Sequence[int]) -> list[Any]:
    """Indices of some parts of a tensor of two dimensions or more, of vectors and of numbers."""
    parts: list[Any] = [...]
    if not shape or 0 in shape:
        return parts
    half, last = shape[0] // 2, shape[0] - 1
    parts += [slice(half), slice(half, None), slice(last, last), last]
    if len(shape) > 1:
        middle = shape[1] // 3
        columns = slice(middle, middle + (shape[1] + 1) // 2)
        parts += [(slice(None), columns), (slice(half, last + 1), columns), (last, columns)]
        parts += [(..., slice(-1, None)), (slice(None), 0)]
    return parts


def assert_as_written(
    written: Mapping[str, Tensor],
    base: Path,
    adapters: Path | Sequence[Path],
    **options: Any,
) -> None:
    """A view has the tensors of a finished merge: whole, in parts, one by one and all in a row."""
    with lorafast.open_merged(base, adapters, **options) as merged:
        assert merged.keys() == sorted(written)
        order = merged.offset_keys()
        assert sorted(order) == sorted(written)
        assert [name for name, _ in merged.items()] == order
        for name, found in merged.items():
            assert_tensor(found, written[name], name)
        for name, expected in written.items():
            assert_tensor(merged.get_tensor(name), expected, name)
            part = merged.get_slice(name)
            assert part.get_shape() == list(expected.shape)
            assert part.get_dtype() == expected.dtype
            whole = from_file(expected)
            for index in parts_of(expected.shape):
                found, wanted = part[index], whole[index]
                assert found.dtype == wanted.dtype, (name, index)
                assert found.shape == wanted.shape, (name, index)
                assert raw(found) == raw(wanted), (name, index)
