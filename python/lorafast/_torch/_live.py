"""Adapters added to a loaded module in place, and taken out again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from lorafast._errors import LorafastError, NumericError, PlanError
from lorafast._torch._devices import exact_products, import_torch
from lorafast._torch._module import Change, ModulePlan, Parameter, plan_module, unwrap
from lorafast._torch._program import Program

if TYPE_CHECKING:
    import torch

    from lorafast._merge import Source, Strategy

Keep = Literal["cpu", "device"] | None

#: Elements of a tile where a weight is not updated by one product in its own dtype: enough to fill
#: a GPU, and few enough for a CPU's caches.
TILE_ELEMENTS = {"cuda": 4 << 20, "cpu": 1 << 18}


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
class _Changed:
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
class _Parted:
    """A parameter that was given a tensor of its own."""

    parameter: Parameter
    original: torch.Tensor


@dataclass
class MergedModule:
    """Adapters that are merged into a module. Made by `lorafast.torch.merge_into`.

    Attributes:
        module: the module.
        adapters: paths of the adapters, in order.
        tensors: names of the tensors that they change.
        keep: where the original weights are kept.
        notes: how the adapters were made to fit where it was not plain.
        warnings: what to know before using the result.
        active: whether the adapters are merged in; False after `unmerge`.
    """

    module: torch.nn.Module
    adapters: list[str]
    tensors: list[str]
    keep: Keep
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    active: bool = True
    _changed: list[_Changed] = field(default_factory=list, repr=False)
    _parted: list[_Parted] = field(default_factory=list, repr=False)
    #: With no copies: by a tensor's id how far earlier swaps' rounding took it, at most.
    _drift: dict[int, tuple[torch.Tensor, float]] = field(default_factory=dict, repr=False)

    def unmerge(self) -> Restoration:
        """Takes the adapters out again.

        With a kept copy every weight is exactly what it was. With `keep=None` the products are
        subtracted, and each weight is what it was to within half a unit in the last place of the
        merged and of the restored value, and as much again for every swap in between; what is
        returned bounds it.

        Raises:
            LorafastError: the adapters are not merged in any more, or somebody else changed a
                weight since (another merge, a training step); nothing is changed then.
        """
        self._check()
        result = Restoration(exact=True)
        try:
            if self.keep is None:
                result = _subtract(self._changed, self._drift)
            else:
                _restore(self._changed)
        except BaseException:
            # So that it can be tried again.
            _note_versions(self._changed)
            raise
        for parted in self._parted:
            _put(parted.parameter, parted.original)
        self.active, self._changed, self._parted, self._drift = False, [], [], {}
        return result

    def swap(
        self,
        adapters: Source | Sequence[Source],
        *,
        strategy: Strategy = "sequential",
        weights: Sequence[float] | None = None,
    ) -> None:
        """Puts other adapters in the place of these, each weight in one pass.

        Args:
            adapters: the others; arguments as for `lorafast.torch.merge_into`.
            strategy: likewise.
            weights: likewise.

        Raises:
            LorafastError: as `merge_into` and `unmerge`; the module and this handle are then as
                they were.
        """
        self._check()
        original = {id(each.tensor): each for each in self._changed}
        originals = {key: each.kept for key, each in original.items() if each.kept is not None}
        if self._parted:
            raise LorafastError(
                "the adapters in place parted tensors that the module shares; unmerge them, and "
                "merge the others then"
            )
        plan = plan_module(
            self.module, adapters, strategy=strategy, weights=weights, originals=originals
        )
        if plan.parted:
            raise LorafastError(
                f"{plan.notes[-1]}: not in a swap; unmerge the adapters in place, and merge the "
                "others then"
            )
        if self.keep is None:
            self._exchange(plan)
        else:
            self._replace(plan, original)
        self.adapters, self.notes, self.warnings = plan.adapters, plan.notes, plan.warnings
        self.tensors = [one.name for each in self._changed for one in each.change.parameters]

    def _replace(self, plan: ModulePlan, before: dict[int, _Changed]) -> None:
        """From kept copies: the new merge of each, or the copy itself."""
        new = _prepare(plan, self.keep, before)
        _check_range(new)
        known = {id(each.tensor) for each in new}
        try:
            for each in new:
                _apply(each, each.kept)
            _restore([old for key, old in before.items() if key not in known])
        except BaseException:
            _restore(new)
            for old in before.values():
                _apply(old, old.kept)
            _note_versions(self._changed)
            raise
        self._changed = new
        _note_versions(self._changed)

    def _exchange(self, plan: ModulePlan) -> None:
        """Without copies: out with the one product and in with the other, in one sum."""
        residual = [change.name for change in plan.changes if change.residual]
        if residual:
            raise PlanError(
                f"the adapters were begun from a part of {residual[0]} itself, which is not known "
                "exactly without a kept copy; merge with keep='cpu' to swap to them"
            )
        old = {id(each.tensor): each for each in self._changed}
        new = _prepare(plan, None, {})
        joint = []
        for each in new:
            assert each.program is not None, "with no copy all updates add"
            former = old.pop(id(each.tensor), None)
            program = each.program
            if former is not None:
                assert former.program is not None, "with no copy all updates add"
                program = Program.joined([former.program.negated(), program])
            joint.append(_Changed(each.change, program, None, None))
        joint += [
            _Changed(each.change, each.program.negated(), None, None)
            for each in old.values()
            if each.program is not None
        ]
        _check_range(joint)
        merged = {id(each.tensor) for each in self._changed}
        roundings = [_rounding(each.tensor) if id(each.tensor) in merged else 0.0 for each in joint]
        try:
            for each in joint:
                _apply(each, each.tensor)
        except BaseException:
            _undo(joint, None)
            self._note_drift(joint, [_rounding(each.tensor) for each in joint], joint)
            _note_versions(self._changed)
            raise
        left = [each for each in joint if not any(each.change is one.change for one in new)]
        self._note_drift(joint, roundings, left)
        self._changed = new
        _note_versions(self._changed)

    def _note_drift(
        self, joint: Sequence[_Changed], roundings: Sequence[float], left: Sequence[_Changed]
    ) -> None:
        """Adds what a swap's roundings took; of what is `left` it is the rounding after, too."""
        import torch

        for each, rounding in zip(joint, roundings, strict=True):
            assert each.program is not None, "with no copy all updates add"
            drift = self._drift.get(id(each.tensor), (each.tensor, 0.0))[1] + rounding
            drift += torch.finfo(each.program.wide).eps * 2 * (each.program.largest_change() or 0)
            if any(each is one for one in left):
                drift += _rounding(each.tensor)
            self._drift[id(each.tensor)] = (each.tensor, drift)

    def _check(self) -> None:
        import torch

        if not self.active:
            raise LorafastError("the adapters are not merged in any more")
        for each in self._changed:
            for parameter in each.change.parameters:
                if getattr(parameter.owner, parameter.leaf, None) is not each.tensor:
                    raise LorafastError(
                        f"{parameter.name} is another tensor than the one that the adapters were "
                        "merged into; load the model again"
                    )
            if each.kind != (each.tensor.dtype, each.tensor.device):
                raise LorafastError(
                    f"{each.change.name} has another dtype or device than when the adapters were "
                    "merged; move it back, or load the model again"
                )
            if each.tensor.is_inference() and not torch.is_inference_mode_enabled():
                raise LorafastError(
                    f"{each.change.name} is an inference tensor; call this under "
                    "torch.inference_mode()"
                )
            if each.version is not None and not _is_as_noted(each.tensor, each.version):
                raise LorafastError(
                    f"{each.change.name} was changed since the adapters were merged (another "
                    "merge, a training step); undo that first, or load the model again"
                )


def merge_into(
    module: torch.nn.Module,
    adapters: Source | Sequence[Source],
    *,
    strategy: Strategy = "sequential",
    weights: Sequence[float] | None = None,
    keep: Keep = "cpu",
) -> MergedModule:
    """Adds adapters to the weights of a loaded module, in place, on whatever devices they are.

    Plans, and results, are those of `lorafast.merge`: W + Σ wᵢ·sᵢ·Bᵢ·Aᵢ with one rounding to
    each parameter's dtype, and DoRA, biases, saved modules, trained tokens, experts and the rest.
    The plan is made, and everything that can be known checked, before the first weight changes.
    A parameter that several layers share, and that adapters change in one of them alone, is
    given to that layer as a copy of its own.

    Args:
        module: a plain module, of transformers or not, whose names are those that the adapters
            were trained on.
        adapters: one or several adapters in PEFT's format: directories or hub ids.
        strategy: as for `lorafast.merge`.
        weights: as for `lorafast.merge`.
        keep: where to keep the original of each weight that changes, for an exact `unmerge`: "cpu"
            (pinned memory, beside a CUDA device), "device", or None for no copy: then the
            products are subtracted, and only updates that add can be merged.

    Returns:
        A handle to take them out again, or to swap them.

    Raises:
        PlanError: adapters and module do not fit together; or a weight that they change is
            sharded (DTensor, FSDP), offloaded, on the meta device, or quantised.
        NumericError: a finite weight would become NaN or infinite.
        ValueError: an argument is outside its domain.
        MissingDependencyError: torch is not installed.
        LorafastError: as `lorafast.plan`. In every case no weight is changed, but for roundings
            where `keep=None` fails in the middle (memory, Ctrl-C) and subtracts what it had added.
    """
    torch = import_torch("merge into a module")
    if keep not in ("cpu", "device", None):
        raise ValueError(f"keep is {keep!r}; it is 'cpu', 'device' or None")
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"module is a {type(module).__name__}, not a torch.nn.Module")
    plain = unwrap(module)
    plan = plan_module(plain, adapters, strategy=strategy, weights=weights, originals={})
    changed = _prepare(plan, keep, {})
    _check_range(changed)
    parted = _part(plan)
    try:
        for each in changed:
            _apply(each, each.tensor)
    except BaseException:
        try:
            _undo(changed, keep)
        finally:
            for one in parted:
                _put(one.parameter, one.original)
        raise
    _note_versions(changed)
    names = [parameter.name for each in changed for parameter in each.change.parameters]
    return MergedModule(
        plain, plan.adapters, names, keep, plan.notes, plan.warnings, True, changed, parted
    )


@contextmanager
def applied(
    module: torch.nn.Module,
    adapters: Source | Sequence[Source],
    *,
    strategy: Strategy = "sequential",
    weights: Sequence[float] | None = None,
    keep: Keep = "cpu",
) -> Iterator[MergedModule]:
    """Merges adapters into a module for the length of a `with` block.

    Arguments and exceptions are those of `lorafast.torch.merge_into`; the block gets its handle.
    """
    handle = merge_into(module, adapters, strategy=strategy, weights=weights, keep=keep)
    try:
        yield handle
    finally:
        if handle.active:
            handle.unmerge()


def _prepare(plan: ModulePlan, keep: Keep, before: dict[int, _Changed]) -> list[_Changed]:
    """Everything that takes memory or can fail, before anything is changed."""
    if keep is None:
        for change in plan.changes:
            if change.replaced or _is_in(change, plan.parted):
                raise PlanError(
                    f"{change.name} is replaced as a whole, which no subtraction undoes; keep a "
                    "copy (keep='cpu')"
                )
    result = []
    for change in plan.changes:
        former = before.get(id(change.tensor))
        original = change.tensor if former is None or former.kept is None else former.kept
        with exact_products(change.tensor.device):
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
        result.append(_Changed(change, program, start, kept, first=first))
    _finish_copies(result)
    return result


def _is_in(change: Change, changes: Sequence[Change]) -> bool:
    return any(change is other for other in changes)


def _program(
    plan: ModulePlan, change: Change, original: torch.Tensor
) -> tuple[Program | None, torch.Tensor | None]:
    """The program of a tensor, and what it begins with where that is an adapter's."""
    import torch

    from lorafast._torch._devices import torch_dtype

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
            "were begun from a part of it; merge the files"
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


def _results(each: _Changed, original: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """The merged rows of a tensor, tile by tile, without writing them."""
    change = each.change
    start = each.start if each.start is not None else _matrix(change, original)
    if each.program is None:
        yield 0, start.to(each.tensor.dtype)
        return
    for first, tile in _tiles(change, start.to(each.tensor.device), each.program):
        yield first, each.program.apply(tile, first)


def _apply(each: _Changed, original: torch.Tensor | None, upto: int | None = None) -> None:
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


def _check_range(changed: Sequence[_Changed]) -> None:
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
    import torch

    plain = tensor.detach()
    if keep == "device" or plain.device.type == "cpu":
        return plain.clone()
    copy = torch.empty(
        plain.shape, dtype=plain.dtype, device="cpu", pin_memory=plain.device.type == "cuda"
    )
    return copy.copy_(plain, non_blocking=True)


def _finish_copies(changed: Sequence[_Changed]) -> None:
    import torch

    for device in {each.tensor.device for each in changed if each.kept is not None}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _copy(source: torch.Tensor | None, target: torch.Tensor) -> None:
    import torch

    if source is not None:
        with torch.no_grad():
            target.copy_(source, non_blocking=True)


def _part(plan: ModulePlan) -> list[_Parted]:
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
            parted.append(_Parted(parameter, original))
            _put(parameter, own)
    return parted


def _put(parameter: Parameter, tensor: torch.Tensor) -> None:
    import torch

    held = parameter.owner._parameters if parameter.leaf in parameter.owner._parameters else None
    if held is not None:
        assert isinstance(tensor, torch.nn.Parameter), "as it was"
        held[parameter.leaf] = tensor
    else:
        parameter.owner._buffers[parameter.leaf] = tensor
    parameter.tensor = tensor


def _undo(changed: Sequence[_Changed], keep: Keep) -> None:
    """After a failure in the middle: back to the copies, or as near as a subtraction comes."""
    for each in changed:
        if each.kept is not None:
            _restore([each])
        elif keep is None and each.program is not None and each.done:
            inverse = _Changed(each.change, each.program.negated(), None, None)
            _apply(inverse, each.tensor, each.done)


def _restore(changed: Sequence[_Changed]) -> None:
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
    return versions[tensor]  # type: ignore[no-any-return]


@cache
def _versions() -> Any:
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()


def _is_as_noted(tensor: torch.Tensor, version: int) -> bool:
    now, earlier = _version(tensor), _same_as(tensor)
    while now is not None and now > version:
        now = earlier.get(now)
    return now == version


def _rounding(tensor: torch.Tensor) -> float:
    """Half a unit in the last place of the largest value."""
    import torch

    least, most = torch.aminmax(tensor.detach())
    return float(_half_units(torch.maximum(-least, most)).item())


def _subtract(
    changed: Sequence[_Changed], drift: dict[int, tuple[torch.Tensor, float]]
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
                _apply(each, each.tensor, rows)
        raise


def _subtracted(
    changed: Sequence[_Changed], drift: dict[int, tuple[torch.Tensor, float]]
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


def _note_versions(changed: Sequence[_Changed]) -> None:
    for each in changed:
        each.version = _version(each.tensor)
        each.kind = (each.tensor.dtype, each.tensor.device)
