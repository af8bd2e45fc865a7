"""Tensors of torch and NumPy over the bytes of a view, none of them copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lorafast._errors import LorafastError, MissingDependencyError, missing
from lorafast._io.torch_tensors import NAMES

if TYPE_CHECKING:
    from lorafast import _core

#: What a view's tensors are of.
Framework = Literal["pt", "numpy"]
#: A dtype's safetensors name, the shape and the bytes, made into a tensor.
Maker = Callable[[str, Sequence[int], "_core.TensorBytes"], Any]

#: Each by all names that safetensors has for it.
_FRAMEWORKS: dict[str, Framework] = {
    **{"pt": "pt", "torch": "pt", "pytorch": "pt"},
    **{"np": "numpy", "numpy": "numpy"},
}
#: Torch's dtypes by their safetensors names.
_TORCH = {safetensors: torch for torch, safetensors in NAMES.items()} | {
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
}
#: NumPy's dtypes, and ml_dtypes' after those.
_NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "C64": "<c8",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
_ML_DTYPES = {
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


def check_framework(name: str) -> Framework:
    """The framework of that name, or of another that safetensors has for it.

    Raises:
        ValueError: there is none.
    """
    if name not in _FRAMEWORKS:
        raise ValueError(f"framework is {name!r}; it is 'pt' (torch) or 'numpy'")
    return _FRAMEWORKS[name]


def maker_for(framework: Framework) -> Maker:
    """What makes tensors of bytes, which it does not copy.

    Raises:
        MissingDependencyError: the framework is not installed.
    """
    if framework == "numpy":
        return _to_numpy
    try:
        import torch  # noqa: F401 (whether it is there)
    except ImportError:
        raise missing("torch", "torch", 'open a merge with framework="pt"') from None
    return _to_torch


def _to_torch(dtype: str, shape: Sequence[int], content: _core.TensorBytes) -> Any:
    import torch

    name = _TORCH.get(dtype)
    kind = getattr(torch, name, None) if name is not None else None
    if kind is None:
        raise LorafastError(f"this torch has no dtype for {dtype}; merge into a file instead")
    if dtype == "F4":
        # Two in a byte, which torch counts.
        shape = [*shape[:-1], shape[-1] // 2]
    if len(content) == 0:
        return torch.empty(tuple(shape), dtype=kind)
    return torch.frombuffer(content, dtype=torch.uint8).view(kind).reshape(tuple(shape))


def _to_numpy(dtype: str, shape: Sequence[int], content: _core.TensorBytes) -> Any:
    import numpy as np

    kind: Any = _NUMPY.get(dtype)
    if kind is None:
        kind = _ml_dtype(dtype)
    # The buffer protocol has no name in the older Pythons.
    memory: Any = content
    return np.frombuffer(memory, dtype=kind).reshape(tuple(shape))


def _ml_dtype(dtype: str) -> Any:
    """A dtype that NumPy has from ml_dtypes alone."""
    name = _ML_DTYPES.get(dtype)
    if name is None:
        raise LorafastError(f'NumPy has no dtype for {dtype}; open the merge with framework="pt"')
    try:
        from importlib import import_module

        ml_dtypes = import_module("ml_dtypes")
    except ImportError:
        raise MissingDependencyError(
            f"NumPy has {dtype} from the package ml_dtypes, which is not installed; install it "
            'with: pip install ml_dtypes; or open the merge with framework="pt", or with '
            'dtype="float32"'
        ) from None
    return getattr(ml_dtypes, name)
