"""Devices by their names, what is wrong with one that cannot be used, and exact products on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorafast._errors import DeviceError, missing
from lorafast._io.device_names import check_name
from lorafast._io.torch_tensors import FLOAT_BYTES, NAMES

if TYPE_CHECKING:
    import torch

#: What torch calls the dtypes of safetensors that can be merged.
DTYPES = {name: own for own, name in NAMES.items() if name in FLOAT_BYTES}


def import_torch(purpose: str) -> Any:
    """The torch module.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise missing("torch", "torch", purpose) from error
    return torch


def open_device(name: str) -> torch.device:
    """The torch device of a name other than "cpu" and "auto", ready for use.

    Raises:
        MissingDependencyError: torch is not installed.
        DeviceError: torch does not see such a device; says what it sees.
    """
    import_torch(f"compute on {name!r}")
    import torch

    if name == "torch:cpu":
        return torch.device("cpu")
    problem = without_cuda(torch)
    if problem is not None:
        raise DeviceError(f"device {name!r} cannot be used: {problem}; use device='cpu'")
    count = torch.cuda.device_count()
    _, _, number = name.partition(":")
    if not number:
        return torch.device("cuda", torch.cuda.current_device())
    # Not torch's own reading of the name, which takes 256 for 0.
    index = int(number)
    if index >= count:
        seen = ", ".join(f"cuda:{at} ({torch.cuda.get_device_name(at)})" for at in range(count))
        raise DeviceError(f"there is no device {name!r}; torch sees {seen}")
    return torch.device("cuda", index)


def analysis_device(name: str, cache: object) -> torch.device | None:
    """The torch device on which analysis is done, or None for the core.

    Raises:
        ValueError: the name is of no device, or there is a cache of the core's figures.
        DeviceError: torch does not see such a device.
    """
    if check_name(name) == "auto":
        try:
            import torch
        except ImportError:
            return None
        name = "cpu" if cache is not None or without_cuda(torch) is not None else "cuda"
    if name == "cpu":
        return None
    if cache is not None:
        raise ValueError(
            f"the cache keeps figures of the CPU, and device is {name!r}; leave one of them out"
        )
    return open_device(name)


def without_cuda(torch: Any) -> str | None:
    """Why torch cannot use CUDA here, or None if it can."""
    version = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"{version} was built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{version} is built for CUDA {torch.version.cuda} and sees no device ({reason})"
    return f"{version} is built for CUDA {torch.version.cuda} and sees no device"


def ran_out(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out.

    torch has an exception for what it allocates itself; what cuBLAS takes for its workspace and
    CUDA for pinned memory fails with a plain one.
    """
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return "CUBLAS_STATUS_ALLOC_FAILED" in text or "CUDA error: out of memory" in text


def host_buffer(
    shape: int | Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Uninitialised memory of the host for copies from and to a device.

    Pinned beside a CUDA device, or, where the system has no more to pin, ordinary memory, which
    only is slower to copy.
    """
    import torch

    size = (shape,) if isinstance(shape, int) else tuple(shape)
    if device.type == "cuda":
        try:
            return torch.empty(size, dtype=dtype, device="cpu", pin_memory=True)
        except RuntimeError as error:
            if not ran_out(error):
                raise
    return torch.empty(size, dtype=dtype, device="cpu")


def stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of a CUDA device."""
    import torch

    make: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
    return make(device)


def describe(device: torch.device) -> str:
    """The device in words, for a report: `cuda:0 (NVIDIA H100)`, `torch:cpu`."""
    if device.type == "cpu":
        return "torch:cpu"
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name.

    Raises:
        DeviceError: this torch does not have it.
    """
    import torch

    dtype: torch.dtype | None = getattr(torch, DTYPES.get(name, ""), None)
    if dtype is None:
        raise DeviceError(
            f"torch {torch.__version__} has no dtype for {name}; install a newer one, or use "
            "device='cpu'"
        )
    return dtype


@dataclass
class _Exact:
    """Who computes exactly now, and the settings before the first of them: the process's own."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    computing: int = 0
    before: dict[str, Any] = field(default_factory=dict)


_exact = _Exact()
#: For each thread the device on which it computes exactly now, if there is one.
_within = threading.local()


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products in the type of their operands: no TF32, no 16-bit sums, no autocast, no autograd.

    Within itself, on the same device, it costs next to nothing: loops over many tensors enter it
    once around and may well call what enters it for each.
    """
    outer: torch.device | None = getattr(_within, "device", None)
    if outer == device:
        yield
        return
    _within.device = device
    try:
        with _exact_on(device):
            yield
    finally:
        _within.device = outer


@contextmanager
def _exact_on(device: torch.device) -> Iterator[None]:
    import torch

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        _set_exact(torch.backends.cuda.matmul)
        try:
            with torch.cuda.device(device):
                yield
        finally:
            _set_back(torch.backends.cuda.matmul)


def _set_exact(products: Any) -> None:
    """Makes products exact for the process, whatever other threads do likewise."""
    with _exact.lock:
        if _exact.computing == 0:
            # Since torch 2.9 the older switch may not even be read once the newer one was used.
            single = "fp32_precision" if hasattr(products, "fp32_precision") else "allow_tf32"
            exact: dict[str, Any] = {single: "ieee" if single == "fp32_precision" else False}
            if hasattr(products, "allow_fp16_accumulation"):
                exact["allow_fp16_accumulation"] = False
            for kind in ("bf16", "fp16"):
                exact[f"allow_{kind}_reduced_precision_reduction"] = False
            _exact.before.clear()
            for name in exact:
                _exact.before[name] = getattr(products, name)
                if hasattr(products, f"{name}_split_k"):
                    # Setting the one alone would switch the other on.
                    both = (_exact.before[name], getattr(products, f"{name}_split_k"))
                    _exact.before[name] = both
            for name, value in exact.items():
                setattr(products, name, value)
        _exact.computing += 1


def _set_back(products: Any) -> None:
    with _exact.lock:
        _exact.computing -= 1
        if _exact.computing == 0:
            for name, value in _exact.before.items():
                setattr(products, name, value)
