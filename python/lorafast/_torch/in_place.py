"""What is done to the tensors of a loaded module: prepared, merged in place, kept, restored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from lorafast._errors import NumericError, PlanError
from lorafast._results import shown
from lorafast._torch.device import exact_products, host_buffer
from lorafast._torch.module_plan import Change, ModulePlan, Parameter
from lorafast._torch.program import Program

if TYPE_CHECKING:
    import torch

Keep = Literal["cpu", "device"] | None

#: Elements of a tile where a weight is not updated by one product in its own dtype: enough to fill
#: a GPU, and few enough for a CPU's caches.
TILE_ELEMENTS = {"cuda": 4 << 20, "cpu": 1 << 18}


@shown
@dataclass(frozen=True)
class Restoration:
    """How near to what they were the weights are after `unmerge`.

    Attributes:
        exact: every bit is what it was.
        largest: a bound on |restored − original| of any element; 0 if exact.
        relative: the Frobenius norm of those bounds over that of the restored weights.
    """

    exact: bool
    largest: float = 0.0
    relative: float = 0.0


@dataclass(eq=False)
class Changed:
    """A tensor as it is merged now."""

    change: Change
    program: Program | None
    start: torch.Tensor | None
    kept: torch.Tensor | None
    version: int | None = None
    #: The version before it was merged, and what it is now.
    first: int | None = None
    kind: tuple[torch.dtype, torch.device] | None = None
    #: Rows that are merged so far.
    done: int = 0

    @property
    def tensor(self) -> torch.Tensor:
        return self.change.tensor


@dataclass
class Parted:
    """A parameter that was given a tensor of its own."""

    parameter: Parameter
    original: torch.Tensor


def prepare(plan: ModulePlan, keep: Keep, before: dict[int, Changed]) -> list[Changed]:
    """Everything that takes memory or can fail, before anything is changed."""
    if keep is None:
        for change in plan.changes:
            if change.replaced or _is_in(change, plan.parted):
                raise PlanError(
                    f"{change.name} is replaced as a whole, which no subtraction undoes; keep a "
                    "copy (keep='cpu')"
                )
    result = []
    for device, group in groupby(plan.changes, lambda change: change.tensor.device):
        with exact_products(device):
            result += [_prepared(plan, change, keep, before) for change in group]
    _finish_copies(result)
    return result


def _prepared(plan: ModulePlan, change: Change, keep: Keep, before: dict[int, Changed]) -> Changed:
    former = before.get(id(change.tensor))
    original = change.tensor if former is None or former.kept is None else former.kept
    program, start = _program(plan, change, original)
    if keep is None and program is not None and program.largest_change() is None:
        raise PlanError(
            f"{change.name} is rescaled or replaced in part, which no subtraction undoes; "
            "keep a copy (keep='cpu')"
        )
    # A tensor that parts from a shared one is a copy itself.
    kept = former.kept if former is not None else None
    if kept is None and keep is not None and not _is_in(change, plan.parted):
        kept = _keep(change.tensor, keep)
    first = _version(change.tensor) if former is None else former.first
    return Changed(change, program, start, kept, first=first)


def _is_in(change: Change, changes: Sequence[Change]) -> bool:
    return any(change is other for other in changes)


def _program(
    plan: ModulePlan, change: Change, original: torch.Tensor
) -> tuple[Program | None, torch.Tensor | None]:
    """The program of a tensor, and what it begins with where that is an adapter's."""
    import torch

    from lorafast._torch.device import torch_dtype

    tensor = change.tensor
    start = None
    dtype = tensor.dtype
    if change.replaced:
        found = plan.core.replacement(change.place)
        assert found is not None, "an adapter brings it"
        dtype = torch_dtype(found[0])
        values = torch.frombuffer(bytearray(found[1]), dtype=dtype)
        start = values.reshape(change.rows, change.columns).to(tensor.device)
    if not change.updates:
        return None, start
    weight = None
    if change.residual and change.turned:
        raise PlanError(
            f"{change.name} is square and lies otherwise than the plan has it, and the adapters "
            "are made of all of it, or were begun from a part; merge the files"
        )
    if change.residual:
        whole = original.detach() if start is None else start
        weight = whole.to("cpu", torch.float64).contiguous().reshape(-1).view(torch.uint8).numpy()
    updates = plan.core.operands(change.place, weight=weight)
    if change.turned:
        for update in updates:
            if update["kind"] in {"low_rank", "dora"}:
                update["transposed"] = not update["transposed"]
    program = Program(updates, dtype=dtype, output=tensor.dtype, device=tensor.device)
    if program.needs_scan:
        matrix = start if start is not None else _matrix(change, original.to(tensor.device))
        program.scan(lambda: _tiles(change, matrix, program))
    return program, start


def _matrix(change: Change, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(change.rows, change.columns)


def _tiles(
    change: Change, matrix: torch.Tensor, program: Program, *, small: bool = False
) -> Iterator[tuple[int, torch.Tensor]]:
    """Runs of rows within segments, as large as the program's scratch allows, or all small."""
    rows = max(1, TILE_ELEMENTS[program.device.type] // max(1, change.columns))
    if program.fused and not small:
        rows = change.rows
    for start, end in change.segments:
        for first in range(start, end, rows):
            yield first, matrix[first : min(end, first + rows)]


def _results(each: Changed, original: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """The merged rows of a tensor, tile by tile, without writing them."""
    change = each.change
    start = each.start if each.start is not None else _matrix(change, original)
    if each.program is None:
        yield 0, start.to(each.tensor.dtype)
        return
    for first, tile in _tiles(change, start.to(each.tensor.device), each.program):
        yield first, each.program.apply(tile, first)


def apply(each: Changed, original: torch.Tensor | None, upto: int | None = None) -> None:
    """Writes the merged weight, made from `original`, which may be the weight itself.

    Args:
        each: the tensor.
        original: W₀.
        upto: the first row that is left as it is; none, if missing.
    """
    tensor, change = each.tensor, each.change
    assert original is not None, "kept, or the weight itself"
    with exact_products(tensor.device):
        if original is not tensor:
            original = original.to(tensor.device, non_blocking=True)
            _used_here([original])
        _used_here([each.start, *(each.program.tensors() if each.program is not None else [])])
        plain = tensor.detach()
        if not plain.is_contiguous():
            result = plain.new_empty(change.rows, change.columns)
            for first, rows in _results(each, original):
                result[first : first + len(rows)] = rows
            plain.copy_(result.reshape(plain.shape))
        elif each.program is None:
            plain.copy_(next(_results(each, original))[1].reshape(plain.shape))
        else:
            target = plain.view(change.rows, change.columns)
            start = each.start if each.start is not None else _matrix(change, original)
            in_place = original is tensor and each.start is None
            for first, tile in _tiles(change, start, each.program):
                if upto is not None and first >= upto:
                    break
                out = target[first : first + len(tile)]
                each.program.apply(out if in_place else tile, first, out)
                each.done = first + len(tile)
        each.done = change.rows


def apply_all(
    changed: Iterable[Changed], original: Callable[[Changed], torch.Tensor | None]
) -> None:
    """Writes the merged weights one after another, each made from its `original`."""
    for device, group in groupby(changed, lambda each: each.tensor.device):
        with exact_products(device):
            for each in group:
                apply(each, original(each))


def check_range(changed: Sequence[Changed]) -> None:
    """Raises if a finite weight would not stay finite; computes what it must to know.

    A change below half a unit in the last place of the dtype's largest number cannot carry a
    finite number beyond it.
    """
    import torch

    for each in changed:
        tensor = each.tensor
        largest = 0.0 if each.program is None else each.program.largest_change()
        limits = torch.finfo(tensor.dtype)
        half_unit = 2.0 ** (math.floor(math.log2(limits.max)) - 1) * limits.eps
        if each.start is None and largest is not None and largest < half_unit:
            continue
        original = each.kept if each.kept is not None else tensor
        original = original.to(tensor.device)
        start = each.start if each.start is not None else _matrix(each.change, original)
        with exact_products(tensor.device):
            for first, rows in _results(each, original):
                before = start[first : first + len(rows)].to(rows.device)
                made = torch.isfinite(before) & ~torch.isfinite(rows)
                if bool(made.any()):
                    index = int(made.flatten().nonzero()[0].item())
                    row, column = first + index // rows.shape[1], index % rows.shape[1]
                    dtype = str(tensor.dtype).removeprefix("torch.")
                    raise NumericError(
                        f"{each.change.name}: the merge makes a finite weight NaN or infinite in "
                        f"{dtype} (the first at row {row}, column {column}); nothing was changed"
                    )


def _keep(tensor: torch.Tensor, keep: Keep) -> torch.Tensor:
    plain = tensor.detach()
    if keep == "device" or plain.device.type == "cpu":
        return plain.clone()
    copy = host_buffer(plain.shape, plain.dtype, plain.device)
    return copy.copy_(plain, non_blocking=True)


def _finish_copies(changed: Sequence[Changed]) -> None:
    import torch

    for device in {each.tensor.device for each in changed if each.kept is not None}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _copy(source: torch.Tensor | None, target: torch.Tensor) -> None:
    import torch

    if source is not None:
        with torch.no_grad():
            target.copy_(source, non_blocking=True)
        _used_here([source])


def _used_here(tensors: Iterable[torch.Tensor | None]) -> None:
    """Keeps what an earlier call may have made on another stream until this one is done with it."""
    import torch

    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def part(plan: ModulePlan) -> list[Parted]:
    """Gives tensors that part from shared ones to their layers, as copies."""
    import torch

    parted = []
    # All copies before the first is put in place: memory may run out.
    copies = [change.tensor.detach().clone() for change in plan.parted]
    for change, copy in zip(plan.parted, copies, strict=True):
        original, own = change.tensor, copy
        if isinstance(original, torch.nn.Parameter):
            own = torch.nn.Parameter(own, requires_grad=original.requires_grad)
        for parameter in change.parameters:
            parted.append(Parted(parameter, original))
            put(parameter, own)
    return parted


def put(parameter: Parameter, tensor: torch.Tensor) -> None:
    import torch

    held = parameter.owner._parameters if parameter.leaf in parameter.owner._parameters else None
    if held is not None:
        assert isinstance(tensor, torch.nn.Parameter), "as it was"
        held[parameter.leaf] = tensor
    else:
        parameter.owner._buffers[parameter.leaf] = tensor
    parameter.tensor = tensor


def undo(changed: Sequence[Changed], keep: Keep) -> None:
    """After a failure in the middle: back to the copies, or as near as a subtraction comes."""
    for each in changed:
        if each.kept is not None:
            restore([each])
        elif keep is None and each.program is not None and each.done:
            inverse = Changed(each.change, each.program.negated(), None, None)
            apply(inverse, each.tensor, each.done)


def restore(changed: Sequence[Changed]) -> None:
    """Copies originals back, and notes that tensors are what they were at their first version."""
    for each in changed:
        _copy(each.kept, each.tensor)
        now = _version(each.tensor)
        if each.kept is not None and now is not None and each.first is not None:
            _same_as(each.tensor)[now] = each.first


def _same_as(tensor: torch.Tensor) -> dict[int, int]:
    """The earlier version of a tensor that a later one is the same as, bit for bit."""
    versions = _versions()
    if tensor not in versions:
        versions[tensor] = {}
    known: dict[int, int] = versions[tensor]
    return known


@cache
def _versions() -> Any:
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()


def is_as_noted(tensor: torch.Tensor, version: int) -> bool:
    now, earlier = _version(tensor), _same_as(tensor)
    while now is not None and now > version:
        now = earlier.get(now)
    return now == version


def rounding(tensor: torch.Tensor) -> float:
    """Half a unit in the last place of the largest value."""
    import torch

    least, most = torch.aminmax(tensor.detach())
    return float(_half_units(torch.maximum(-least, most)).item())


def subtract(
    changed: Sequence[Changed], drift: dict[int, tuple[torch.Tensor, float]]
) -> Restoration:
    """Subtracts all, or in the end nothing if it fails."""
    for each in changed:
        each.done = 0
    try:
        return _subtracted(changed, drift)
    except BaseException:
        for each in changed:
            if each.done:
                rows, each.done = each.done, 0
                apply(each, each.tensor, rows)
        raise


def _subtracted(
    changed: Sequence[Changed], drift: dict[int, tuple[torch.Tensor, float]]
) -> Restoration:
    import torch

    largest = errors = size = 0.0
    known = {id(each.tensor) for each in changed}
    for key, (tensor, far) in drift.items():
        if key not in known:
            largest = max(largest, far)
            errors += tensor.numel() * far**2
            size += (
                float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64).item()) ** 2
            )
    for each in changed:
        assert each.program is not None, "with no copy all updates add"
        program = each.program.negated()
        plain = each.tensor.detach()
        # Of one that does not lie row after row this is a copy.
        matrix = plain.reshape(each.change.rows, each.change.columns)
        noise = 2 * torch.finfo(program.wide).eps * (program.largest_change() or 0.0)
        noise += drift.get(id(each.tensor), (each.tensor, 0.0))[1]
        with exact_products(plain.device):
            for first, tile in _tiles(each.change, matrix, program, small=True):
                bound = _half_units(tile) + noise
                program.apply(tile, first, tile)
                if plain.is_contiguous():
                    each.done = first + len(tile)
                bound += _half_units(tile)
                largest = max(largest, float(bound.max().item()))
                errors += float(bound.double().square().sum().item())
                size += float(tile.double().square().sum().item())
            if not plain.is_contiguous():
                plain.copy_(matrix.reshape(plain.shape))
                each.done = each.change.rows
    relative = math.sqrt(errors / size) if size else 0.0
    return Restoration(exact=False, largest=largest, relative=relative)


def _half_units(values: torch.Tensor) -> torch.Tensor:
    """Half a unit in the last place of each value, float32."""
    import torch

    limits = torch.finfo(values.dtype)
    wide = values.detach().abs().clamp(min=limits.tiny)
    wide = wide.double() if values.dtype == torch.float64 else wide.float()
    exponents = torch.frexp(wide).exponent
    return torch.ldexp(torch.full_like(wide, limits.eps / 4), exponents)


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else int(tensor._version)


def note_versions(changed: Sequence[Changed]) -> None:
    for each in changed:
        each.version = _version(each.tensor)
        each.kind = (each.tensor.dtype, each.tensor.device)
