"""A loaded module as something that a merge can be planned against.

The planner needs names, dtypes and shapes, and of what an adapter saved whole the values, which it
reads and compares. So names, scales, orientations, and every check and message are those of a
file merge.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lorafast import _core
from lorafast._errors import PlanError
from lorafast._io.sources import ADAPTER_PATTERNS, locate
from lorafast._io.torch_tensors import dtype_name, memory_of
from lorafast._words import with_article

if TYPE_CHECKING:
    import torch

    from lorafast._io.sources import ModuleBase, NamedTensor
    from lorafast._types import Source, Strategy, Weight

MERGEABLE = {"float64", "float32", "float16", "bfloat16"}
#: Classes of parameters that hold codes: of bitsandbytes.
QUANTISED = {"Params4bit", "Int8Params"}


@dataclass(eq=False)
class Parameter:
    """One tensor of a module, and where it is held."""

    name: str
    owner: torch.nn.Module
    leaf: str
    tensor: torch.Tensor
    #: Why nothing can be merged into it, if so.
    obstacle: str | None = None
    #: Its shape as the layer has it, where it is stored otherwise.
    shape: tuple[int, ...] = ()


@dataclass(eq=False)
class Change:
    """What a plan does to one tensor of a module.

    Attributes:
        parameters: every name of it, with its owner.
        place: where the plan has it.
        rows: of its matrix.
        columns: of its matrix.
        segments: runs of rows that the same updates change.
        updates: how many.
        replaced: whether an adapter brings it whole.
        residual: whether all of it is needed: an initialisation took a part of it out, or an
            update is made of the whole.
        turned: the plan's idea of a square weight's orientation is wrong.
    """

    parameters: list[Parameter]
    place: tuple[int, int]
    rows: int
    columns: int
    segments: list[tuple[int, int]]
    updates: int
    replaced: bool
    residual: bool
    turned: bool = False

    @property
    def name(self) -> str:
        return self.parameters[0].name

    @property
    def tensor(self) -> torch.Tensor:
        return self.parameters[0].tensor


@dataclass(eq=False)
class ModulePlan:
    """A plan against a module.

    Attributes:
        core: the core's plan.
        changes: what happens to each tensor; several of one tensor where names that share it are
            to part.
        adapters: paths.
        parted: those of the changes whose parameters share their tensor with others that keep it.
        notes: how adapters were made to fit.
        warnings: what to know before using the result.
    """

    core: _core.Plan
    changes: list[Change]
    adapters: list[str]
    parted: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The module itself, of one that torch.compile or a data-parallel wrapper stands around."""
    import torch

    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(module, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            inner = module.module
        if not isinstance(inner, torch.nn.Module):
            return module
        module = inner


def parameters_of(module: torch.nn.Module) -> Iterator[Parameter]:
    """Every parameter and buffer under every name, with what stands against merging into it."""
    for path, owner in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for leaf, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is None:
                continue
            shape = tuple(tensor.shape)
            obstacle = _obstacle(tensor)
            extents = (getattr(owner, "out_features", 0), getattr(owner, "in_features", 0))
            if obstacle is not None and leaf == "weight" and all(extents):
                shape = extents
            yield Parameter(f"{prefix}{leaf}", owner, leaf, tensor, obstacle, shape)


def _obstacle(tensor: torch.Tensor) -> str | None:
    import torch

    kind = type(tensor).__name__
    dtype = str(tensor.dtype).removeprefix("torch.")
    obstacle = None
    if kind == "DTensor" or hasattr(tensor, "device_mesh"):
        obstacle = "is sharded over several devices (DTensor); merge the files, and load those"
    elif kind in QUANTISED:
        obstacle = f"is quantised ({kind}); load the model unquantised, or merge its files"
    elif tensor.is_meta:
        obstacle = (
            "is on the meta device, without data: it was never loaded, or a device_map has moved "
            "it off (hooks would bring the old weight back); load the model without offloading"
        )
    elif tensor.device.type not in {"cpu", "cuda"}:
        obstacle = f"is on the device {tensor.device}; move the model to the CPU or to CUDA"
    elif type(tensor) not in {torch.Tensor, torch.nn.Parameter} and kind != "Buffer":
        obstacle = f"is {with_article(kind)}, which is no plain tensor; load the model without it"
    elif tensor.is_inference() and not torch.is_inference_mode_enabled():
        obstacle = "is an inference tensor; merge under torch.inference_mode()"
    elif dtype not in MERGEABLE:
        obstacle = f"is quantised, or no number that can be merged into ({dtype})"
    return obstacle


def plan_module(
    module: torch.nn.Module,
    adapters: Source | Sequence[Source],
    *,
    strategy: Strategy | None,
    weights: Sequence[Weight] | None,
    originals: Mapping[int, torch.Tensor],
) -> ModulePlan:
    """Plans a merge into a module.

    Args:
        module: a plain module, not a wrapper.
        adapters: as for `lorafast.merge`.
        strategy: likewise.
        weights: likewise.
        originals: what tensors were before an earlier merge, by their `id`.

    Raises:
        PlanError: adapters and module do not fit together, or a tensor cannot be merged into.
        LorafastError: as `lorafast.plan`.
    """
    from lorafast._merge.api import MergeOptions
    from lorafast._merge.plan import make_plan

    _refuse_wrappers(module)
    found = {parameter.name: parameter for parameter in parameters_of(module)}
    given = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    paths = [locate(adapter, ADAPTER_PATTERNS) for adapter in given]
    base = _described(module, found, originals)
    plan = make_plan(base, paths, MergeOptions(strategy=strategy, weights=weights))
    notes, warnings = plan.notes, plan.warnings
    result = ModulePlan(plan.core, [], plan.adapters, notes=notes, warnings=warnings)
    _sort(result, found)
    return result


def _refuse_wrappers(module: torch.nn.Module) -> None:
    for name, inner in module.named_modules():
        if hasattr(inner, "base_layer") and hasattr(inner, "lora_A"):
            raise PlanError(
                f"{name or type(module).__name__} is wrapped by PEFT; give the plain model "
                "(unload() of the PEFT model)"
            )
        if any(type(own).__name__ == "FlatParameter" for own in inner._parameters.values()):
            raise PlanError(
                f"{name or type(module).__name__} is sharded by FSDP, whose flat parameters hold "
                "no layer's weight; merge the files instead, and load those"
            )


def _described(
    module: torch.nn.Module,
    found: Mapping[str, Parameter],
    originals: Mapping[int, torch.Tensor],
) -> ModuleBase:
    """The module as the core plans against it, which reads only the values that it compares."""
    _wait_for(found.values())
    tensors: list[NamedTensor] = []
    # The widest first, as a file of them would have them.
    for parameter in sorted(found.values(), key=lambda each: -each.tensor.element_size()):
        dtype = str(parameter.tensor.dtype).removeprefix("torch.")
        name = dtype_name(parameter.tensor.dtype)
        if name is None or (parameter.obstacle is not None and dtype not in MERGEABLE):
            # Said to be a number, so that the plan gets as far as to need it.
            name = "F32"
        values = None
        if parameter.obstacle is None:
            values = partial(memory_of, originals.get(id(parameter.tensor), parameter.tensor))
        tensors.append((parameter.name, name, list(parameter.shape), values))
    return "the module", json.dumps(_config(module), default=str), tensors


def _wait_for(parameters: Iterable[Parameter]) -> None:
    """Waits for this thread's streams, as the thread that the core reads from does not."""
    import torch

    for device in {each.tensor.device for each in parameters if each.tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def _config(module: torch.nn.Module) -> dict[str, Any]:
    """The module's config, as far as a plan needs one."""
    config = getattr(module, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        settings: dict[str, Any] = config.to_dict()
        settings.pop("quantization_config", None)
        # What the config says is not always so; and what is so is what matters.
        tied = _ties_embeddings(module)
        for part in [each for each in settings.values() if isinstance(each, dict)]:
            if "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = tied
        return settings | {"tie_word_embeddings": tied}
    # What the planner would find in the config of a model that is made of such layers.
    turned = any(type(inner).__name__ == "Conv1D" for inner in module.modules())
    experts = any(getattr(inner, "is_transposed", False) is True for inner in module.modules())
    return {
        "model_type": "gpt2" if turned else "module",
        "tie_word_embeddings": False,
        "experts_config": {"model_type": "gpt_oss"} if experts else {},
    }


def _ties_embeddings(module: torch.nn.Module) -> bool:
    parts = [
        getattr(module, name, lambda: None)()
        for name in ("get_input_embeddings", "get_output_embeddings")
    ]
    weights = [getattr(part, "weight", None) for part in parts]
    return weights[0] is not None and weights[0] is weights[1]


def _sort(result: ModulePlan, found: Mapping[str, Parameter]) -> None:
    """Finds the tensors of the module that are changed, and refuses what cannot be."""
    problems: list[str] = []
    sharing: dict[int, list[Parameter]] = {}
    for parameter in found.values():
        sharing.setdefault(id(parameter.tensor), []).append(parameter)
    planned = {entry["name"]: entry for entry in result.core.changed_tensors()}
    updates = {
        entry["name"]: json.dumps(entry["updates"]) for entry in result.core.describe()["tensors"]
    }
    for left, right in _overlapping(found):
        if left.name in planned or right.name in planned:
            problems.append(
                f"{left.name} and {right.name} are two parameters in the same memory; give each "
                "its own, or share one parameter"
            )
    done: set[str] = set()
    for name, entry in planned.items():
        own = found.get(name)
        if own is None:
            problems.append(f"the adapters bring {name}, which the module does not have")
            continue
        if own.obstacle is not None:
            problems.append(f"{name} {own.obstacle}")
            continue
        if tuple(entry["shape"]) != own.shape:
            problems.append(
                f"an adapter brings {name} of shape {entry['shape']}, and the module's is "
                f"{list(own.shape)}; resize the module first (resize_token_embeddings)"
            )
            continue
        if name in done:
            continue
        group = sharing[id(own.tensor)]
        alike = [
            other
            for other in group
            if other.name in planned
            and updates[other.name] == updates[name]
            and _start(result, planned[other.name]) == _start(result, entry)
        ]
        done |= {other.name for other in alike}
        change = Change(
            alike,
            entry["place"],
            entry["rows"],
            entry["columns"],
            entry["segments"],
            entry["updates"],
            entry["replaced"],
            entry["residual"],
            _is_wrongly_turned(own, entry, json.loads(updates[name])),
        )
        result.changes.append(change)
        if len(alike) < len(group):
            result.parted.append(change)
            names = ", ".join(other.name for other in group if other not in alike)
            result.notes.append(
                f"{', '.join(other.name for other in alike)} shared a tensor with {names}, and "
                "has its own now, because the adapters change one and not the other"
            )
    if problems:
        raise PlanError("\n".join(problems), problems)


def _overlapping(found: Mapping[str, Parameter]) -> Iterator[tuple[Parameter, Parameter]]:
    """Parameters that are not the same, and lie in the same memory as far as their extents tell."""
    spans = []
    for each in {id(one.tensor): one for one in found.values() if one.obstacle is None}.values():
        tensor = each.tensor
        if tensor.numel():
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((count - 1) * step for count, step in steps)
            start = tensor.data_ptr()
            end = start + (last + 1) * tensor.element_size()
            spans.append((str(tensor.device), start, end, each))
    spans.sort(key=lambda span: span[:3])
    for left, right in pairwise(spans):
        if left[0] == right[0] and right[1] < left[2]:
            yield left[3], right[3]


def _start(result: ModulePlan, entry: Mapping[str, Any]) -> tuple[str, bytes] | None:
    """What an adapter brings in a tensor's place, if one does."""
    return result.core.replacement(entry["place"]) if entry["replaced"] else None


def _is_wrongly_turned(
    parameter: Parameter, entry: Mapping[str, Any], updates: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether the layer's class says that a square weight lies otherwise than was planned."""
    import torch

    if parameter.leaf != "weight" or len(entry["shape"]) != 2 or entry["rows"] != entry["columns"]:
        return False
    if type(parameter.owner).__name__ == "Conv1D":
        truth = True
    elif isinstance(parameter.owner, torch.nn.Linear):
        truth = False
    else:
        return False
    return any(
        update["transposed"] != truth and "part" not in update
        for update in updates
        if update["kind"] in {"low_rank", "dora"}
    )
