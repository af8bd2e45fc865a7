"""A merge plan in a screenful: what changes, at which scale, what stays, what will be written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorafast._cli.format import bytes_text, count_text, dtype_text, number_text, plural
from lorafast._cli.patterns import collapse
from lorafast._cli.terminal import Column
from lorafast._merge.coverage import left_over, names_text, summary_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lorafast._cli.terminal import Terminal
    from lorafast._core import Coverage, PlanDescription, PlannedAdapter, TensorDescription

# What tells one group of changes from another.
UPDATE_FIELDS = ("adapter", "kind", "rank", "scale", "weight", "transposed")
COUNT_AND_NAMES = (Column("count", number=True), Column("names"))

#: The tensors without updates by what becomes of them, each kind under its heading.
BESIDE_UPDATES = {
    "adapters bring whole": ("replace",),
    "repeat another of the base": ("repeat",),
    "with the scales of what changes": ("rescale",),
    "no adapter changes": ("copy", "cast"),
}


def show_plan(plan: PlanDescription, terminal: Terminal) -> None:
    """Print a plan, as `MergePlan.to_dict()` gives it, without its warnings."""
    tensors: Sequence[TensorDescription] = plan["tensors"]
    adapters: Sequence[PlannedAdapter] = plan["adapters"]
    terminal.heading(f"Plan: {plural(len(adapters), 'adapter')} into {plan['base']}")
    terminal.facts(_facts(plan, len(tensors)))
    changed = [tensor for tensor in tensors if tensor["updates"]]
    if changed:
        _show_changes(changed, adapters, terminal)
    for adapter in adapters:
        terminal.line()
        terminal.heading(f"All of {adapter['name']}")
        show_coverage(adapter["coverage"], terminal, fields=False)
    for heading, actions in BESIDE_UPDATES.items():
        group = [tensor for tensor in tensors if tensor["action"] in actions]
        if group:
            terminal.line()
            terminal.heading(f"{plural(len(group), 'tensor')} {heading}")
            _show_others(group, terminal)
    for note in plan["notes"]:
        terminal.line(f"note: {note}")


def show_coverage(coverage: Coverage, terminal: Terminal, *, fields: bool) -> None:
    """Print what becomes of an adapter's tensors, config fields and files, and what is not used.

    Args:
        coverage: as a plan or a listing has it.
        terminal: where to print.
        fields: list the config fields that are not used as well as the tensors.
    """
    terminal.line(f"  {summary_text(coverage)}")
    shown: Coverage = coverage if fields else {**coverage, "fields": []}
    rows = [(use, names_text(names), reason) for use, reason, names in left_over(shown)]
    if rows:
        terminal.table((Column("use"), Column("names"), Column("reason")), rows)


def _facts(plan: PlanDescription, tensor_count: int) -> dict[str, str]:
    facts = {
        "strategy": plan["strategy"],
        "tensors": f"{_changed_count(plan):,} of {tensor_count:,} change",
        "parameters": count_text(plan["total_parameters"]),
        "dtype": dtype_text(plan["dtype"]),
        "to write": bytes_text(plan["bytes_to_write"]),
    }
    if "reads" in plan:
        reads = plan["reads"]
        count = plural(reads["requests"], "request")
        facts["from stores"] = f"{bytes_text(reads['bytes'])} in {count}"
    if plan["components"] and any(component["name"] for component in plan["components"]):
        facts["components"] = ", ".join(
            f"{component['name']} ({component['tensors_changed']:,} change)"
            if component["tensors_changed"]
            else f"{component['name']} (kept)"
            for component in plan["components"]
        )
    if plan["tensors_cast"]:
        facts["tensors"] += f", {plan['tensors_cast']:,} are only converted"
    if plan["side_files"]:
        facts["side files"] = ", ".join(_with_origin(name, plan) for name in plan["side_files"])
    if plan["left_out"]:
        facts["left out"] = ", ".join(plan["left_out"])
    return facts


def _with_origin(name: str, plan: PlanDescription) -> str:
    """A side file's name, and the adapter that it is of."""
    of, _, position = plan["file_origins"][name].partition(" ")
    return f"{name} (of {plan['adapters'][int(position)]['name']})" if of == "adapter" else name


def _changed_count(plan: PlanDescription) -> int:
    return plan["tensors_merged"] + plan["tensors_replaced"] + plan["tensors_repeated"]


def _show_changes(
    tensors: Sequence[TensorDescription], adapters: Sequence[PlannedAdapter], terminal: Terminal
) -> None:
    """List, for each adapter, rank and scale, the tensors that are changed in that way."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for tensor in tensors:
        for update in tensor["updates"]:
            key = tuple(update.get(field) for field in UPDATE_FIELDS)
            groups.setdefault(key, []).append(tensor["name"])
    for key, names in sorted(groups.items(), key=lambda group: group[0][0]):
        shared = dict[str, Any](zip(UPDATE_FIELDS, key, strict=True))
        adapter = adapters[shared["adapter"]]["name"]
        terminal.line()
        terminal.heading(f"{adapter} changes {plural(len(names), 'tensor')}: {_how(shared)}")
        terminal.table(COUNT_AND_NAMES, [(str(count), name) for name, count in collapse(names)])


def _how(update: Mapping[str, Any]) -> str:
    """Return `low-rank, rank 16, scale 2, weight 0.7`."""
    words = [update["kind"].replace("_", "-")]
    if update["transposed"]:
        words[0] += " into the transposed weight"
    if update["rank"] is not None:
        words.append(f"rank {update['rank']}")
    words += [
        f"{field} {number_text(update[field])}"
        for field in ("scale", "weight")
        if update[field] is not None
    ]
    return ", ".join(words)


def _show_others(tensors: Sequence[TensorDescription], terminal: Terminal) -> None:
    def dtype(tensor: TensorDescription) -> str:
        if tensor["dtype"] == tensor["output_dtype"]:
            return str(tensor["dtype"])
        return f"{tensor['dtype']} → {tensor['output_dtype']}"

    rows = [
        (str(count), pattern, dtypes)
        for dtypes, names in _grouped(tensors, dtype).items()
        for pattern, count in collapse(names)
    ]
    terminal.table((*COUNT_AND_NAMES, Column("dtype")), rows)


def _grouped(
    tensors: Sequence[TensorDescription], key: Callable[[TensorDescription], str]
) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for tensor in tensors:
        groups.setdefault(key(tensor), []).append(tensor["name"])
    return groups
