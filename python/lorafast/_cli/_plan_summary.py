"""A merge plan in a screenful: what changes, at which scale, what stays, what will be written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorafast._cli._format import bytes_text, count_text, number_text, plural
from lorafast._cli._patterns import collapse
from lorafast._cli._terminal import Column

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lorafast._cli._terminal import Terminal

    Tensor = Mapping[str, Any]


def show_plan(plan: Mapping[str, Any], terminal: Terminal) -> None:
    """Print a plan, as `MergePlan.to_dict()` gives it, without its warnings."""
    tensors: Sequence[Tensor] = plan["tensors"]
    adapters: Sequence[Mapping[str, Any]] = plan["adapters"]
    terminal.heading(f"Plan: {plural(len(adapters), 'adapter')} into {plan['base']}")
    terminal.facts(_facts(plan, len(tensors)))
    changed = [tensor for tensor in tensors if tensor["updates"]]
    if changed:
        terminal.line()
        terminal.heading("Changes")
        _show_changes(changed, adapters, terminal)
    unchanged = [tensor for tensor in tensors if not tensor["updates"]]
    if unchanged:
        terminal.line()
        terminal.heading("Stays as it is")
        _show_unchanged(unchanged, terminal)
    for note in plan["notes"]:
        terminal.line(f"note: {note}")


def _facts(plan: Mapping[str, Any], tensor_count: int) -> dict[str, str]:
    facts = {
        "strategy": plan["strategy"],
        "tensors": f"{plan['tensors_merged']:,} of {tensor_count:,} change",
        "parameters": count_text(plan["total_parameters"]),
        "dtype": plan["dtype"],
        "to write": bytes_text(plan["bytes_to_write"]),
    }
    if plan["tensors_cast"]:
        facts["tensors"] += f", {plan['tensors_cast']:,} are only converted"
    if plan["side_files"]:
        facts["side files"] = ", ".join(plan["side_files"])
    if plan["left_out"]:
        facts["left out"] = ", ".join(plan["left_out"])
    return facts


def _show_changes(
    tensors: Sequence[Tensor], adapters: Sequence[Mapping[str, Any]], terminal: Terminal
) -> None:
    """One row for each group of tensors that one adapter changes in the same way."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for tensor in tensors:
        for update in tensor["updates"]:
            key = (
                update["adapter"],
                update["kind"],
                update.get("rank"),
                update.get("scale"),
                update["weight"],
                update.get("transposed", False),
            )
            groups.setdefault(key, []).append(tensor["name"])
    rows = []
    for key, names in sorted(groups.items(), key=lambda group: group[0][0]):
        adapter, kind, rank, scale, weight, transposed = key
        name = adapters[adapter]["name"]
        update = kind.replace("_", "-") + (", transposed" if transposed else "")
        for pattern, count in collapse(names):
            rows.append(
                (
                    name,
                    update,
                    "" if rank is None else str(rank),
                    "" if scale is None else number_text(scale),
                    number_text(weight),
                    str(count),
                    pattern,
                )
            )
    columns = (
        Column("adapter"),
        Column("update"),
        Column("rank", number=True),
        Column("scale", number=True),
        Column("weight", number=True),
        Column("tensors", number=True),
        Column("names"),
    )
    terminal.table(columns, _without_repeats(rows, 5))


def _show_unchanged(tensors: Sequence[Tensor], terminal: Terminal) -> None:
    def dtype(tensor: Tensor) -> str:
        if tensor["dtype"] == tensor["output_dtype"]:
            return str(tensor["dtype"])
        return f"{tensor['dtype']} → {tensor['output_dtype']}"

    rows = [
        (str(count), dtypes, pattern)
        for dtypes, names in _grouped(tensors, dtype).items()
        for pattern, count in collapse(names)
    ]
    columns = (Column("tensors", number=True), Column("dtype"), Column("names"))
    terminal.table(columns, rows)


def _grouped(tensors: Sequence[Tensor], key: Callable[[Tensor], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for tensor in tensors:
        groups.setdefault(key(tensor), []).append(tensor["name"])
    return groups


def _without_repeats(rows: Sequence[tuple[str, ...]], width: int) -> list[tuple[str, ...]]:
    """Blank the first cells of a row where they are those of the row above."""
    result = []
    above: tuple[str, ...] = ()
    for row in rows:
        same = row[:width] == above[:width]
        result.append(("",) * width + row[width:] if same else row)
        above = row
    return result
