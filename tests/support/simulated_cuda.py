"""A CUDA device without one: torch's own operations on the CPU, under the eyes of a checker.

A tensor "on the device" is a tensor subclass that says so, around an ordinary tensor of the CPU;
one in pinned memory is another of the kind. Below autograd every operation on either, views,
factories and copies among them, comes to `_run`, which computes it at once and tells the checker
what it read and wrote, and on which stream. A copy to pinned memory arrives when somebody waits for
it, and until then there is 0xFF; pinned memory that is being copied from has to stay as it is.
`torch.cuda` is replaced where the code under test looks at it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import pytest
import torch
from lorafast._io.torch_tensors import memory_of
from lorafast._torch import file_merge, module_plan, program
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from support import host_threads
from support.clocks import Actor, Memory
from support.host_threads import HandedOver, host
from support.simulated_streams import (
    Event,
    OnItsWay,
    Simulator,
    Stream,
    activated,
    active,
)

aten = torch.ops.aten
#: Make memory without writing to it.
EMPTY = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}
#: Change nothing but what torch knows of a tensor.
NOTHING = {aten.detach_, aten.requires_grad_}
#: Take tensors of the host beside those of a device.
MIXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
GEMM = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_}
POISON = 0xFF


class Simulated(torch.Tensor):
    """A tensor on the simulated device, or in pinned memory."""

    inner: torch.Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, inner: torch.Tensor, memory: Memory, device: torch.device | str) -> Simulated:
        made: Simulated = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner, made.memory = inner, memory
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        return _dispatch(function, arguments, options or {})

    def _on_host(self) -> torch.Tensor:
        if self.is_cuda:
            raise TypeError("can't convert cuda:0 device type tensor to numpy.")
        simulator = active()
        with simulator.lock:
            simulator.settle(self.memory, host())
        return self.inner.detach()

    def numpy(self, **options: Any) -> Any:
        """The pinned memory, which counts as read now; for what comes later see `Watched`."""
        array = self._on_host().numpy(**options)
        if self.memory.written is not None and self.numel():
            with active().lock:
                active().checker.read(self.memory, host())
        _pinned[self.inner.untyped_storage().data_ptr()] = self.memory
        return array

    def tolist(self) -> Any:
        return self.cpu().tolist() if self.is_cuda else self.clone().tolist()

    def record_stream(self, stream: Stream) -> None:
        if self.memory.home is not stream.actor:
            self.memory.recorded[stream.actor.number] = stream.actor

    def is_pinned(self, device: Any = None) -> bool:
        return not self.is_cuda

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __repr__(self, **options: Any) -> str:
        return f"Simulated({tuple(self.shape)}, {self.dtype}, {self.device})"


#: By address what `numpy` was called on.
_pinned: WeakValueDictionary[int, Memory] = WeakValueDictionary()


class Mode(TorchDispatchMode):
    """Sees what no argument gives away: factories, and copies of the host's own tensors."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        return _dispatch(function, arguments, options or {})


def _dispatch(function: Any, arguments: Any, options: dict[str, Any]) -> Any:
    given = [each for each in tree_leaves((arguments, options)) if isinstance(each, torch.Tensor)]
    ours = [each for each in given if isinstance(each, Simulated)]
    device = options.get("device")
    on_device = device is not None and torch.device(device).type == "cuda"
    if not (ours or on_device or options.get("pin_memory")):
        return function(*arguments, **options)
    if function._can_decompose() and function.name() not in {"aten::is_pinned"}:
        # Comes here under inference mode, and is made of others.
        with Mode():
            result = function.decompose(*arguments, **options)
        if result is not NotImplemented:
            return result
    simulator = active()
    with simulator.lock:
        return _run(simulator, function, arguments, options)


def inner_of(value: Any) -> Any:
    return value.inner if isinstance(value, Simulated) else value


def _run(simulator: Simulator, function: Any, arguments: Any, options: dict[str, Any]) -> Any:
    packet = function.overloadpacket
    if packet is aten.copy_:
        return _copy(simulator, *arguments, **options)
    if packet is aten._to_copy:
        return _to_copy(simulator, arguments[0], **options)
    given = [each for each in tree_leaves((arguments, options)) if isinstance(each, torch.Tensor)]
    ours = [each for each in given if isinstance(each, Simulated)]
    device = _device_of(simulator, packet, given, options.get("device"))
    actor = simulator.launch(device) if device.type == "cuda" else host()
    silent = function.is_view or packet in NOTHING or packet in EMPTY
    written = [] if silent else list(_written(function, arguments, options))
    for each in [] if silent else ours:
        # Before anything is computed: what copies bring arrives now, if the actor waited for it.
        simulator.settle(each.memory, actor)
        # What is written to as well is checked as that, against all that is before a write.
        if not any(each is other for other in written):
            _touch(simulator, each, actor, "read")
    _take_hidden(simulator, packet, given, options, device)
    plain = {key: value for key, value in options.items() if key != "pin_memory"}
    if "device" in plain:
        plain["device"] = torch.device("cpu")
    made = function(*tree_map(inner_of, arguments), **tree_map(inner_of, plain))
    if packet in EMPTY and made.dtype != torch.bool:
        made.untyped_storage().fill_(POISON)
    for each in written:
        _touch(simulator, each, actor, "write")
    if not any(isinstance(each, torch.Tensor) for each in tree_leaves(made)):
        if device.type == "cuda":
            # Only the host can have a number.
            simulator.waited(actor.publish())
        return made
    results = _Results(simulator, ours, device, None if silent else actor)
    results.what, results.pinned = str(packet), bool(options.get("pin_memory"))
    return tree_map(results.wrap, made)


def _device_of(
    simulator: Simulator, packet: Any, given: list[torch.Tensor], asked: Any
) -> torch.device:
    """Where an operation runs; its tensors have to be there."""
    devices = [each.device for each in given if each.is_cuda] if asked is None else [asked]
    device = torch.device(devices[0] if devices else "cpu")
    if device.type == "cpu":
        return device
    device = torch.device("cuda", simulator.index(device))
    for each in [] if packet in MIXED else given:
        if each.device != device and not (each.device.type == "cpu" and each.dim() == 0):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"{device} and {each.device}! ({packet})"
            )
    return device


def _take_hidden(
    simulator: Simulator,
    packet: Any,
    given: list[torch.Tensor],
    options: dict[str, Any],
    device: torch.device,
) -> None:
    """Memory that an operation takes for itself."""
    if device.type != "cuda":
        return
    if packet in GEMM:
        simulator.use_workspace(device)
    if packet is aten.linalg_vector_norm and options.get("dtype") not in {None, given[0].dtype}:
        # Converts the whole of it beforehand.
        size = given[0].numel() * options["dtype"].itemsize
        simulator.allocate(size, device, "conversion")


class _Results:
    """What an operation made, as tensors of the device: of old memory or of new."""

    what = ""
    pinned = False

    def __init__(
        self,
        simulator: Simulator,
        given: list[Simulated],
        device: torch.device,
        writer: Actor | None,
    ) -> None:
        self.simulator, self.device, self.writer = simulator, device, writer
        self.same = {id(each.inner): each for each in given}
        self.shared = {each.inner.untyped_storage()._cdata: each for each in given}

    def wrap(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in self.same:
            return self.same[id(value)]
        storage = value.untyped_storage()
        if storage._cdata in self.shared:
            other = self.shared[storage._cdata]
            return Simulated(value, other.memory, other.device)
        if self.device.type == "cuda":
            memory = self.simulator.allocate(storage.nbytes(), self.device, self.what)
        elif self.pinned:
            memory = pinned_memory(storage.nbytes())
        else:
            return value
        if self.writer is not None and value.numel():
            self.simulator.checker.write(memory, self.writer)
        made = Simulated(value, memory, self.device)
        self.shared[storage._cdata] = made
        return made


def pinned_memory(size: int) -> Memory:
    return Memory(f"pinned memory of {size} bytes", size)


def _written(function: Any, arguments: Any, options: dict[str, Any]) -> Iterator[Simulated]:
    for position, argument in enumerate(function._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = arguments[position] if position < len(arguments) else options.get(argument.name)
        if isinstance(value, Simulated):
            yield value


def _touch(simulator: Simulator, tensor: torch.Tensor, actor: Actor, how: str) -> Any:
    if not isinstance(tensor, Simulated) or not tensor.numel():
        return None
    simulator.settle(tensor.memory, actor)
    return getattr(simulator.checker, how)(tensor.memory, actor)


def _to_copy(
    simulator: Simulator,
    source: torch.Tensor,
    *,
    device: Any = None,
    non_blocking: bool = False,
    pin_memory: Any = None,
    **options: Any,
) -> torch.Tensor:
    to = source.device if device is None else torch.device(device)
    if to.type == "cuda":
        to = torch.device("cuda", simulator.index(to))
    content = torch.empty(0)
    own: Simulated | torch.Tensor
    if to.type == "cpu" and not source.is_cuda:
        _touch(simulator, source, host(), "read")
        return aten._to_copy(inner_of(source), **options)
    content = aten._to_copy(inner_of(source), **options)
    shaped = torch.empty_like(content)
    if to.type == "cuda":
        memory = simulator.allocate(content.untyped_storage().nbytes(), to, "copy")
        own = Simulated(shaped, memory, to)
    else:
        own = Simulated(shaped, pinned_memory(content.numel()), "cpu") if non_blocking else shaped
    _copy(simulator, own, source, non_blocking)
    return own


def _copy(
    simulator: Simulator, target: Any, source: Any, non_blocking: bool = False
) -> torch.Tensor:
    if not target.is_cuda and not source.is_cuda:
        _touch(simulator, source, host(), "read")
        inner_of(target).copy_(inner_of(source))
        _touch(simulator, target, host(), "write")
        return target
    actor = simulator.launch(source.device if source.is_cuda else target.device)
    if source.is_cuda and target.is_cuda and source.device != target.device:
        # torch makes the two devices' current streams wait for each other.
        other = simulator.launch(target.device)
        actor.follow(other)
    read = _touch(simulator, source, actor, "read")
    if isinstance(target, Simulated):
        simulator.settle(target.memory, actor)
    place = inner_of(target)
    place.copy_(inner_of(source))
    written = _touch(simulator, target, actor, "write")
    if source.is_cuda and target.is_cuda:
        if source.device != target.device:
            simulator.launch(target.device).follow(actor)
    elif not non_blocking or (source.is_cuda and not isinstance(target, Simulated)):
        simulator.waited(actor.publish())
    elif source.is_cuda and written is not None:
        copy = OnItsWay(written, target.memory, place, place.clone(), incoming=True)
        simulator.on_their_way.append(copy)
        _poison(place)
    elif isinstance(source, Simulated) and read is not None:
        copy = OnItsWay(read, source.memory, source.inner, source.inner.clone(), incoming=False)
        simulator.on_their_way.append(copy)
    return target


def _poison(place: torch.Tensor) -> None:
    if place.dtype == torch.bool:
        place.logical_not_()
    else:
        place.view(torch.uint8).fill_(POISON)


# What the code under test finds in place of torch.cuda, and of the core's execution


class Watched:
    """The core's execution, whose threads read and write pinned memory."""

    def __init__(self, execution: Any) -> None:
        self.execution = execution

    def __getattr__(self, name: str) -> Any:
        return getattr(self.execution, name)

    @staticmethod
    def _note(content: Any, how: str) -> None:
        simulator = active()
        start = content.__array_interface__["data"][0]
        with simulator.lock:
            memory = _pinned.get(start)
            if memory is not None and content.size:
                simulator.settle(memory, host())
                getattr(simulator.checker, how)(memory, host())

    def read_rows(self, place: Any, first: int, buffer: Any) -> None:
        self._note(buffer, "write")
        self.execution.read_rows(place, first, buffer)

    def write_rows(self, place: Any, first: int, content: Any) -> None:
        self._note(content, "read")
        self.execution.write_rows(place, first, content)

    def measure_rounding(self, place: Any, *values: Any, **how: Any) -> None:
        for content in values:
            self._note(content, "read")
        self.execution.measure_rounding(place, *values, **how)


def watch_files(patches: pytest.MonkeyPatch, files: Any) -> None:
    """Lets the checker see the rows that `_files` reads and writes, and the slots' way."""
    begin = files._Merge.__init__

    def watched(self: Any, plan: Any, execution: Any, device: Any, **options: Any) -> None:
        begin(self, plan, Watched(execution), device, **options)
        self.free = HandedOver(self.free)

    patches.setattr(files._Merge, "__init__", watched)


class _Current:
    """`torch.cuda.stream` and `torch.cuda.device`."""

    simulator: ClassVar[Simulator]

    def __init__(self, stream: Stream | None = None, device: Any = None) -> None:
        self.stream, self.device = stream, device

    def __enter__(self) -> None:
        local = active().local.__dict__
        self.before = (dict(local.get("streams", {})), local.get("device", 0))
        if self.stream is not None:
            local["streams"] = self.before[0] | {self.stream.number: self.stream}
            local["device"] = self.stream.number
        elif self.device is not None:
            local["device"] = active().index(self.device)

    def __exit__(self, *error: object) -> None:
        active().local.__dict__.update(streams=self.before[0], device=self.before[1])


def _make_stream(device: Any = None, priority: int = 0, **options: Any) -> Stream:
    simulator = active()
    count = sum(1 for _ in Stream.known(simulator))
    return Stream(simulator, simulator.index(device), f"{count}")


def _patch_cuda(patches: pytest.MonkeyPatch, simulator: Simulator) -> None:
    def free_memory(device: Any = None) -> tuple[int, int]:
        return simulator.capacity - simulator.allocated, total

    def set_fraction(fraction: float, device: Any = None) -> None:
        simulator.capacity = int(fraction * total)

    def reset_peak(device: Any = None) -> None:
        simulator.peak = simulator.peak_allocated = simulator.allocated

    total = simulator.capacity
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: simulator.count,
        "current_device": simulator.index,
        "get_device_name": lambda device=None: "Simulated GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": free_memory,
        "memory_allocated": lambda device=None: simulator.allocated,
        "max_memory_allocated": lambda device=None: simulator.peak_allocated,
        "memory_reserved": lambda device=None: simulator.allocated,
        "reset_peak_memory_stats": reset_peak,
        "set_per_process_memory_fraction": set_fraction,
        "synchronize": simulator.synchronize,
        "empty_cache": lambda: None,
        "Stream": _make_stream,
        "Event": Event,
        "current_stream": simulator.current,
        "default_stream": lambda device=None: simulator.defaults[simulator.index(device)],
        "stream": _Current,
        "device": lambda device: _Current(device=device),
    }
    for name, value in replaced.items():
        patches.setattr(torch.cuda, name, value)
    # A build without CUDA does not have it.
    clear = simulator.clear_workspaces
    patches.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
    patches.setattr(
        torch.backends.cuda, "cublas_workspace_size", lambda: simulator.workspace, raising=False
    )


@contextmanager
def simulated_cuda(
    *, capacity: int = 1 << 30, workspace: int = 0, count: int = 1, files: Any = file_merge
) -> Iterator[Simulator]:
    """Simulated devices for the length of a block.

    Args:
        capacity: bytes of memory of each.
        workspace: bytes that GEMMs take once for each thread and stream.
        count: how many devices.
        files: the module that merges files there.

    Yields:
        What has happened; `problems` are checked by whoever asks for them.
    """
    if torch.cuda.is_available():
        torch.cuda.init()
    simulator = Simulator(capacity, workspace, count)
    obstacle = module_plan._obstacle
    # Without a device its guards do nothing; and torch.tensor copies where a mode sees it.
    torch._C._ensureCUDADeviceGuardSet()
    # A module that moves gets new parameters: no plain one can become a tensor of ours.
    overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    with pytest.MonkeyPatch.context() as patches, activated(simulator):
        host_threads.begin()
        _patch_cuda(patches, simulator)
        host_threads.patch_threads(patches, Mode)
        watch_files(patches, files)
        patches.setattr(module_plan, "_obstacle", lambda tensor: obstacle(inner_of(tensor)))
        asked = host_threads.asked_for_by(host(), memory_of, Mode)
        patches.setattr(module_plan, "memory_of", asked)
        patches.setattr(program, "_proved", {})
        try:
            with Mode():
                yield simulator
        finally:
            for index in range(count):
                simulator.synchronize(torch.device("cuda", index))
            simulator.closed = True
            torch.__future__.set_overwrite_module_params_on_conversion(overwritten)
            torch._C._set_only_lift_cpu_tensors(lifted)


@contextmanager
def opened(device: str) -> Iterator[str]:
    """A device by its name; "simulated" is the simulated one, on which nothing may be found."""
    if device != "simulated":
        yield device
        return
    with simulated_cuda() as simulator:
        yield "cuda"
    assert simulator.checker.problems == []
