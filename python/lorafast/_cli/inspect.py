"""`lorafast inspect`: what a checkpoint or an adapter holds, read from its headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from lorafast._cli.command import Command
from lorafast._cli.format import bytes_text, count_text, number_text, plural, shape_text
from lorafast._cli.options import add_options, chosen
from lorafast._cli.patterns import collapse
from lorafast._cli.terminal import Column
from lorafast._merge.options import StoreOptions
from lorafast._options import options_in
from lorafast._types import AdapterFormat

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from lorafast._cli.terminal import Terminal
    from lorafast._core import (
        AdapterSummary,
        ListedComponent,
        ListedFile,
        ListedModule,
        ListedTensor,
        Listing,
    )


# Trainers put whole training logs into the metadata; the table shows that they are there.
LONGEST_METADATA_VALUE = 72
MAX_METADATA_ROWS = 12
# What every library writes.
BOILERPLATE = {"format": "pt"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast inspect`."""
    parser.add_argument(
        "path", metavar="PATH", help="a checkpoint, pipeline or adapter: directory or file"
    )
    parser.add_argument(
        "--tensors", action="store_true", help="list every tensor by itself, with its file"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--format",
        choices=get_args(AdapterFormat),
        help="an adapter's format, where its files do not tell it (default: told by the files)",
    )
    add_options(parser, options_in(StoreOptions, verb="inspect"))


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Inspect a path and print what is there."""
    import lorafast

    stores = chosen(arguments, options_in(StoreOptions, verb="inspect"))
    contents = lorafast.inspect(arguments.path, format=arguments.format, **stores).to_dict()
    for warning in contents["warnings"]:
        terminal.warn(warning)
    if arguments.json:
        terminal.json(contents)
    else:
        _show(contents, terminal, every_tensor=arguments.tensors)
    return 0


def _show(contents: Listing, terminal: Terminal, *, every_tensor: bool) -> None:
    _show_summary(contents, terminal)
    _show_metadata(contents["metadata"], terminal)
    _show_components(contents["components"], terminal)
    _show_files(contents["files"], terminal)
    _show_dtypes(contents["tensors"], terminal)
    if every_tensor:
        _show_every_tensor(contents["tensors"], terminal)
    elif contents["adapter"] is not None and contents["adapter"]["modules"]:
        _show_modules(contents["adapter"]["modules"], terminal)
    else:
        _show_tensor_groups(contents["tensors"], terminal)
    if contents["adapter"] is not None:
        from lorafast._cli.plan_summary import show_coverage

        terminal.line()
        terminal.heading("What a merge makes of it")
        show_coverage(contents["adapter"]["coverage"], terminal, fields=True)


def _show_summary(contents: Listing, terminal: Terminal) -> None:
    terminal.heading(f"{contents['kind'].capitalize()} {contents['path']}")
    facts = {
        "parameters": count_text(contents["total_parameters"]),
        "size": bytes_text(contents["total_bytes"]),
        "tensors": f"{len(contents['tensors']):,} in {plural(len(contents['files']), 'file')}",
    }
    adapter = contents["adapter"]
    if adapter is not None:
        facts |= _adapter_facts(contents["format"], adapter)
    elif contents["config"] is not None:
        config = contents["config"]
        architectures = config.get("architectures") or [
            config.get("_class_name") or config.get("model_type", "")
        ]
        facts["architecture"] = ", ".join(map(str, architectures))
    if contents["quantised"]:
        schemes = contents["quantised"].items()
        facts["quantised"] = "; ".join(f"{count:,} × {scheme}" for scheme, count in schemes)
    terminal.facts(facts)


def _adapter_facts(format_name: str | None, adapter: AdapterSummary) -> dict[str, str]:
    """What there is to say of an adapter, beside its tensors."""
    facts = {"type": str(adapter["type"])}
    if format_name is not None:
        facts["format"] = format_name
    for fact in ("algorithm", "trainer", "family"):
        if adapter[fact] is not None and format_name != "peft":
            facts[fact] = str(adapter[fact])
    if adapter["components"]:
        facts["components"] = ", ".join(adapter["components"])
    if adapter["r"] is not None:
        facts["rank"] = str(adapter["r"])
    if adapter["alpha"] is not None:
        rule = "alpha / √rank" if adapter["rslora"] else "alpha / rank"
        facts["alpha"] = f"{number_text(adapter['alpha'])} (scale = {rule})"
    if adapter["base"]:
        facts["base"] = str(adapter["base"])
    if format_name not in ("peft", None):
        facts["scale"] = str(adapter["scale"])
        facts["to merge"] = "; ".join(adapter["needs"])
    facts["modules"] = f"{len(adapter['modules']):,}"
    if adapter["features"]:
        facts["features"] = ", ".join(adapter["features"])
    if adapter["notes"]:
        facts["names"] = "; ".join(adapter["notes"])
    return facts


def _show_metadata(metadata: Mapping[str, str], terminal: Terminal) -> None:
    if not metadata or metadata == BOILERPLATE:
        return
    terminal.line()
    terminal.heading("Metadata")
    shown = list(metadata.items())[:MAX_METADATA_ROWS]
    terminal.facts({key: _shortened(str(value)) for key, value in shown})
    if len(metadata) > len(shown):
        terminal.line(f"  … and {len(metadata) - len(shown)} more; --json shows all")


def _shortened(value: str) -> str:
    if len(value) <= LONGEST_METADATA_VALUE:
        return value
    return f"{value[:LONGEST_METADATA_VALUE]}… ({len(value):,} characters)"


def _show_components(components: Sequence[ListedComponent], terminal: Terminal) -> None:
    if not components:
        return
    terminal.line()
    terminal.heading("Components")
    columns = (
        Column("component"),
        Column("kind"),
        Column("class"),
        Column("tensors", number=True),
        Column("parameters", number=True),
        Column("size", number=True),
        Column("dtypes"),
    )
    rows = [
        (
            component["name"] or "(all)",
            component["kind"].replace("_", " "),
            component["class_name"] or "",
            f"{component['tensors']:,}",
            count_text(component["parameters"]),
            bytes_text(component["bytes"]),
            ", ".join(component["dtypes"]),
        )
        for component in components
    ]
    terminal.table(columns, rows)


def _show_files(files: Sequence[ListedFile], terminal: Terminal) -> None:
    terminal.line()
    terminal.heading("Files")
    terminal.table(
        (Column("file"), Column("tensors", number=True), Column("size", number=True)),
        [(file["name"], f"{file['tensors']:,}", bytes_text(file["bytes"])) for file in files],
    )


def _show_dtypes(tensors: Sequence[ListedTensor], terminal: Terminal) -> None:
    totals: dict[str, list[int]] = {}
    for tensor in tensors:
        total = totals.setdefault(tensor["dtype"], [0, 0, 0])
        total[0] += 1
        total[1] += _parameters(tensor)
        total[2] += tensor["bytes"]
    terminal.line()
    terminal.heading("Dtypes")
    columns = (
        Column("dtype"),
        Column("tensors", number=True),
        Column("parameters", number=True),
        Column("size", number=True),
    )
    rows = [
        (dtype, f"{count:,}", count_text(parameters), bytes_text(size))
        for dtype, (count, parameters, size) in totals.items()
    ]
    terminal.table(columns, rows)


def _show_tensor_groups(tensors: Sequence[ListedTensor], terminal: Terminal) -> None:
    """One row for each set of tensors that differ in the numbers of their layers alone."""
    groups: dict[tuple[str, tuple[int, ...]], dict[str, ListedTensor]] = {}
    for tensor in tensors:
        key = (tensor["dtype"], tuple(tensor["shape"]))
        groups.setdefault(key, {})[tensor["name"]] = tensor
    rows = []
    for (dtype, shape), members in groups.items():
        one = next(iter(members.values()))
        for pattern, count in collapse(members):
            rows.append(
                (
                    str(count),
                    pattern,
                    dtype,
                    shape_text(list(shape)),
                    bytes_text(count * one["bytes"]),
                )
            )
    terminal.line()
    terminal.heading("Tensors")
    columns = (
        Column("count", number=True),
        Column("names"),
        Column("dtype"),
        Column("shape"),
        Column("size", number=True),
    )
    terminal.table(columns, rows)


def _show_every_tensor(tensors: Sequence[ListedTensor], terminal: Terminal) -> None:
    terminal.line()
    terminal.heading("Tensors")
    columns = (
        Column("name"),
        Column("dtype"),
        Column("shape"),
        Column("size", number=True),
        Column("file"),
    )
    rows = [
        (
            tensor["name"],
            tensor["dtype"],
            shape_text(tensor["shape"]),
            bytes_text(tensor["bytes"]),
            tensor["file"],
        )
        for tensor in tensors
    ]
    terminal.table(columns, rows)


def _show_modules(modules: Sequence[ListedModule], terminal: Terminal) -> None:
    """One row for each set of adapted modules that differ in their layers' numbers alone."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for module in modules:
        key = (module["rank"], module["alpha"], module["scaling"], tuple(module["shape"]))
        groups.setdefault(key, []).append(module["name"])
    rows = [
        (
            str(count),
            pattern,
            str(rank),
            "" if alpha is None else number_text(alpha),
            "" if scaling is None else number_text(scaling),
            shape_text(list(shape)),
        )
        for (rank, alpha, scaling, shape), names in groups.items()
        for pattern, count in collapse(names)
    ]
    terminal.line()
    terminal.heading("Modules")
    columns = (
        Column("count", number=True),
        Column("names"),
        Column("rank", number=True),
        Column("alpha", number=True),
        Column("scale", number=True),
        Column("shape"),
    )
    terminal.table(columns, rows)


def _parameters(tensor: ListedTensor) -> int:
    count = 1
    for size in tensor["shape"]:
        count *= size
    return count


COMMAND = Command(
    name="inspect",
    summary="show what a checkpoint or an adapter holds",
    description="Show a checkpoint's or an adapter's files, dtypes, tensors and, for an adapter,\n"
    "ranks and scales, for a model of diffusion its components. Only headers are read: it\n"
    "takes no longer for a large model.",
    examples=(
        "lorafast inspect llama",
        "lorafast inspect style --tensors",
        "lorafast inspect model-00001-of-00004.safetensors --json",
    ),
    add_arguments=add_arguments,
    run=run,
)
