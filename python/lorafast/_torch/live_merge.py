"""Adapters added to a loaded module in place, and taken out again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorafast._errors import LorafastError, PlanError
from lorafast._results import shown
from lorafast._torch import in_place
from lorafast._torch.device import import_torch
from lorafast._torch.in_place import Changed, Keep, Parted, Restoration
from lorafast._torch.module_plan import ModulePlan, plan_module, unwrap
from lorafast._torch.program import Program
from lorafast._words import with_article

if TYPE_CHECKING:
    import torch

    from lorafast._types import Source, Strategy, Weight


@shown
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
    _changed: list[Changed] = field(default_factory=list, repr=False)
    _parted: list[Parted] = field(default_factory=list, repr=False)
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
                result = in_place.subtract(self._changed, self._drift)
            else:
                in_place.restore(self._changed)
        except BaseException:
            # So that it can be tried again.
            in_place.note_versions(self._changed)
            raise
        for parted in self._parted:
            in_place.put(parted.parameter, parted.original)
        self.active, self._changed, self._parted, self._drift = False, [], [], {}
        return result

    def swap(
        self,
        adapters: Source | Sequence[Source],
        *,
        strategy: Strategy | None = None,
        weights: Sequence[Weight] | None = None,
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

    def _replace(self, plan: ModulePlan, before: dict[int, Changed]) -> None:
        """From kept copies: the new merge of each, or the copy itself."""
        new = in_place.prepare(plan, self.keep, before)
        in_place.check_range(new)
        known = {id(each.tensor) for each in new}
        try:
            in_place.apply_all(new, lambda each: each.kept)
            in_place.restore([old for key, old in before.items() if key not in known])
        except BaseException:
            in_place.restore(new)
            in_place.apply_all(before.values(), lambda old: old.kept)
            in_place.note_versions(self._changed)
            raise
        self._changed = new
        in_place.note_versions(self._changed)

    def _exchange(self, plan: ModulePlan) -> None:
        """Without copies: out with the one product and in with the other, in one sum."""
        residual = [change.name for change in plan.changes if change.residual]
        if residual:
            raise PlanError(
                f"the adapters are made of {residual[0]} itself or a part of it, which is not "
                "known exactly without a kept copy; merge with keep='cpu' to swap to them"
            )
        old = {id(each.tensor): each for each in self._changed}
        new = in_place.prepare(plan, None, {})
        joint = []
        for each in new:
            assert each.program is not None, "with no copy all updates add"
            former = old.pop(id(each.tensor), None)
            program = each.program
            if former is not None:
                assert former.program is not None, "with no copy all updates add"
                program = Program.joined([former.program.negated(), program])
            joint.append(Changed(each.change, program, None, None))
        joint += [
            Changed(each.change, each.program.negated(), None, None)
            for each in old.values()
            if each.program is not None
        ]
        in_place.check_range(joint)
        merged = {id(each.tensor) for each in self._changed}
        roundings = [
            in_place.rounding(each.tensor) if id(each.tensor) in merged else 0.0 for each in joint
        ]
        try:
            in_place.apply_all(joint, lambda each: each.tensor)
        except BaseException:
            in_place.undo(joint, None)
            self._note_drift(joint, [in_place.rounding(each.tensor) for each in joint], joint)
            in_place.note_versions(self._changed)
            raise
        left = [each for each in joint if not any(each.change is one.change for one in new)]
        self._note_drift(joint, roundings, left)
        self._changed = new
        in_place.note_versions(self._changed)

    def _note_drift(
        self, joint: Sequence[Changed], roundings: Sequence[float], left: Sequence[Changed]
    ) -> None:
        """Adds what a swap's roundings took; of what is `left` it is the rounding after, too."""
        import torch

        for each, rounding in zip(joint, roundings, strict=True):
            assert each.program is not None, "with no copy all updates add"
            drift = self._drift.get(id(each.tensor), (each.tensor, 0.0))[1] + rounding
            drift += torch.finfo(each.program.wide).eps * 2 * (each.program.largest_change() or 0)
            if any(each is one for one in left):
                drift += in_place.rounding(each.tensor)
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
            if each.version is not None and not in_place.is_as_noted(each.tensor, each.version):
                raise LorafastError(
                    f"{each.change.name} was changed since the adapters were merged (another "
                    "merge, a training step); undo that first, or load the model again"
                )


def merge_into(
    module: torch.nn.Module,
    adapters: Source | Sequence[Source],
    *,
    strategy: Strategy | None = None,
    weights: Sequence[Weight] | None = None,
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
        raise ValueError(f"module is {with_article(type(module).__name__)}, not a torch.nn.Module")
    plain = unwrap(module)
    plan = plan_module(plain, adapters, strategy=strategy, weights=weights, originals={})
    changed = in_place.prepare(plan, keep, {})
    in_place.check_range(changed)
    parted = in_place.part(plan)
    try:
        in_place.apply_all(changed, lambda each: each.tensor)
    except BaseException:
        try:
            in_place.undo(changed, keep)
        finally:
            for one in parted:
                in_place.put(one.parameter, one.original)
        raise
    in_place.note_versions(changed)
    names = [parameter.name for each in changed for parameter in each.change.parameters]
    return MergedModule(
        plain, plan.adapters, names, keep, plan.notes, plan.warnings, True, changed, parted
    )


@contextmanager
def applied(
    module: torch.nn.Module,
    adapters: Source | Sequence[Source],
    *,
    strategy: Strategy | None = None,
    weights: Sequence[Weight] | None = None,
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
