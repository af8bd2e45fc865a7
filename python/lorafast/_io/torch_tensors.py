"""Tensors of torch as names of types and bytes; torch itself is not imported here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: The safetensors names of torch's dtypes.
NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}

#: Bytes of an element of the types that products are made in, by their safetensors names.
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def dtype_name(dtype: torch.dtype) -> str | None:
    """The safetensors name of a dtype; `None` for one that it does not have."""
    return NAMES.get(str(dtype).removeprefix("torch."))


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row-major; a copy where they do not lie so on the CPU."""
    import torch

    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data
