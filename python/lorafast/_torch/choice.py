"""Which executor carries a plan out, and why."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafast._torch.device import open_device, without_cuda

if TYPE_CHECKING:
    import torch

    from lorafast import _core

#: Multiplications and additions a second of one core's kernels, in billions, by instruction set;
#: about half of what they reach on data in cache, for a whole merge.
CORE_SPEED = {"portable": 2.0, "neon": 15.0, "avx2": 15.0, "avx512": 30.0, "avx512_bf16": 30.0}
#: Bytes with which a link is tried.
TRIAL_BYTES = 32 << 20


@dataclass(frozen=True)
class Done:
    """What an executor did.

    Attributes:
        finished: the core's summary, as plain objects, and the lock on the output.
        device: what made the products.
        notes: why it was chosen, where it was not named.
        fallbacks: for each reason the tensors that the CPU merged instead of the device.
    """

    finished: tuple[_core.Summary, _core.OutputLock]
    device: str
    notes: list[str] = field(default_factory=list)
    fallbacks: dict[str, list[str]] = field(default_factory=dict)


def carry_out(
    plan: _core.Plan,
    output: str | os.PathLike[str] | _core.StoreLocation,
    options: Mapping[str, Any],
    *,
    device: str,
    memory: int | None,
    progress: Callable[[int, int], object] | None,
    prove: Callable[[_core.Execution], None] | None = None,
) -> Done:
    """Carries a plan out on the device of that name; arguments as for `lorafast.merge`.

    Args:
        plan: the core's plan.
        output: the directory to write.
        options: the core's, of the execution.
        device: a name other than "cpu".
        memory: the most bytes of the device's memory to use; most of what is free if missing.
        progress: called with the bytes done and the bytes in all.
        prove: holds what was written against the plan, before it is a model.
    """
    notes: list[str] = []
    if device == "auto":
        device, note = choose(plan, options.get("threads"))
        notes.append(note)
    if device == "cpu":
        if prove is None:
            return Done(plan.execute(output, options, progress=progress), "cpu", notes)
        running = plan.begin(output, options)
        try:
            running.run(set(), progress=progress)
            prove(running)
            return Done(running.finish(), "cpu", notes)
        except BaseException:
            running.abort()
            raise
    from lorafast._torch.file_merge import execute

    done = execute(
        plan,
        output,
        open_device(device),
        options,
        memory=memory,
        progress=progress,
        prove=prove,
    )
    return Done(done.finished, done.device, notes, done.fallbacks)


def choose(plan: _core.Plan, threads: int | None) -> tuple[str, str]:
    """The faster device for a plan, "cpu" or "cuda", and the reason in words."""
    if "torch" not in sys.modules and not _may_have_gpu():
        # Not worth the seconds that importing torch takes.
        return "cpu", "device auto: the CPU, because this system has no GPU that torch could use"
    try:
        import torch
    except ImportError:
        return "cpu", "device auto: the CPU, because torch is not installed"
    problem = without_cuda(torch)
    if problem is not None:
        return "cpu", f"device auto: the CPU, because {problem}"
    try:
        link = link_speed(open_device("cuda"))
    except RuntimeError as error:
        # No memory left, or a device that is another process's alone.
        return "cpu", f"device auto: the CPU, because CUDA fails ({str(error).splitlines()[0]})"
    return compare(plan, threads, link)


def _may_have_gpu() -> bool:
    if sys.platform != "linux":
        return sys.platform == "win32"
    # NVIDIA's driver, WSL's, and AMD's.
    return any(Path("/dev", name).exists() for name in ("nvidiactl", "dxg", "kfd"))


def compare(plan: _core.Plan, threads: int | None, link: float) -> tuple[str, str]:
    """The choice, given a link of so many bytes a second each way."""
    from lorafast._core import build_info
    from lorafast._io.torch_tensors import FLOAT_BYTES

    changed = plan.changed_tensors()
    tensors = [each for each in changed if each["updates"] and not each["quantised"]]
    sent = sum(
        tensor["rows"]
        * tensor["columns"]
        * max(FLOAT_BYTES[tensor["dtype"]], FLOAT_BYTES[tensor["output_dtype"]])
        for tensor in tensors
    )
    work = sum(tensor["work"] for tensor in tensors)
    cores = threads or _processors()
    speed = CORE_SPEED[build_info()["instruction_set"]] * 1e9 * cores
    sending, saved = sent / link, work / speed
    numbers = (
        f"sending {sent / 1e9:.1f} GB each way at {link / 1e9:.1f} GB/s takes about "
        f"{sending:.1f} s, the products about {saved:.1f} s on {cores} CPU threads"
    )
    device = "cuda" if saved > sending else "cpu"
    return device, f"device auto: {'CUDA' if device == 'cuda' else 'the CPU'}, because {numbers}"


def _processors() -> int:
    """Those that this process may use, which a container or a scheduler makes fewer."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def link_speed(device: torch.device) -> float:
    """Bytes a second from pinned memory to a CUDA device, as measured now."""
    import torch

    host = torch.empty(TRIAL_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
    target = torch.empty_like(host, device=device)
    target.copy_(host, non_blocking=True)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    target.copy_(host, non_blocking=True)
    torch.cuda.synchronize(device)
    return TRIAL_BYTES / (time.perf_counter() - start)
