"""The card of a merged model: its lineage for the hub, its licence, and what it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorafast._merge.provenance import hub_id_of_base, identify
from lorafast._report.cells import cell, code, table, weight_cell
from lorafast._report.text import format_options

if TYPE_CHECKING:
    from lorafast._core import PlanDescription
    from lorafast._merge.plan import MergePlan

#: What a merge keeps of the front matter of its base's card.
KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")
#: By which a subtraction knows a card that goes with the merge.
MARK = "<!-- Written by lorafast merge -->"
#: Longer cards are no cards.
LONGEST = 1 << 20


def merge_card(plan: MergePlan, description: PlanDescription) -> str:
    """The page, in which nothing that came from strangers' files is markup.

    Args:
        plan: the merge.
        description: what the core says of it.
    """
    adapters = description["adapters"]
    base = identify(plan.base)
    hub_id = hub_id_of_base(plan.base, [adapter["base_model"] for adapter in adapters])
    kept = _kept(plan.base)
    ids = [hub_id, *(identify(path).hub_id for path in plan.adapters)]
    lines = ["---"]
    known = [json.dumps(each) for each in dict.fromkeys(ids) if each is not None]
    if known:
        lines += ["base_model:", *(f"- {each}" for each in known), "base_model_relation: merge"]
    lines += [line for name in KEPT for line in kept.get(name, [])]
    if "library_name" not in kept:
        lines.append(f"library_name: {_library(plan.base, description)}")
    lines += ["tags:", "- merge", "- lora", "- lorafast", "---", ""]
    name = hub_id or base.name
    lines += [
        MARK,
        "",
        f"# {cell(name)} with {len(adapters)} adapter{'s' * (len(adapters) != 1)} merged",
        "",
        f"LoRA adapters were merged into {code(name)} with lorafast {cell(_version())}. "
        "`merge_report.md` says what became of every tensor.",
        "",
    ]
    if "license" in kept:
        lines += ["The licence is the base's; the adapters' own may add to it.", ""]
    if _card_path(plan.base) is not None:
        lines += ["The base's own card is [README.base.md](README.base.md).", ""]
    weights = description["weights"]
    rows = (
        [
            code(identity.name),
            code(identity.revision) if identity.revision else "",
            weight_cell(1.0 if weights is None else weights[position]),
            ", ".join(sorted(ranks, key=int)),
        ]
        for position, (identity, ranks) in enumerate(
            zip(map(identify, plan.adapters), _ranks(description), strict=True)
        )
    )
    lines += table(["Adapter", "Revision", "Weight", "Rank"], rows, right=False)
    facts = {
        "Base": code(base.name),
        "Base's revision": code(base.revision) if base.revision else "",
        "Strategy": cell(description["strategy"]),
        "Strategy's options": cell(format_options(description.get("strategy_options") or {})),
        "Seed": str(description.get("seed", "")),
        "dtype": cell(description["dtype"]),
        "Tensors changed": str(plan.tensors_merged + plan.tensors_replaced + plan.tensors_repeated),
        "Tensors carried over": str(plan.tensors_copied + plan.tensors_cast),
    }
    shown = [(key, value) for key, value in facts.items() if value]
    lines += ["", *table(["", ""], shown, right=False)]
    return "\n".join(lines) + "\n"


def _library(base: str, description: PlanDescription) -> str:
    """The library that loads the output, as the hub calls it."""
    if not description["components"]:
        return "transformers"
    classes = {component["class_name"] for component in description["components"]}
    if classes == {None} and not Path(base).is_dir():
        return "diffusion-single-file"
    # A text encoder by itself is transformers'.
    config = Path(base) / "config.json"
    is_diffusers = not config.is_file() or '"_class_name"' in config.read_text(errors="replace")
    return "diffusers" if is_diffusers else "transformers"


def _version() -> str:
    from lorafast import _core

    return _core.__version__


def _ranks(description: PlanDescription) -> list[set[str]]:
    """The ranks of each adapter's updates."""
    ranks: list[set[str]] = [set() for _ in description["adapters"]]
    for tensor in description["tensors"]:
        for update in tensor["updates"]:
            if update["rank"]:
                ranks[update["adapter"]].add(str(update["rank"]))
    return ranks


def _card_path(base: str) -> Path | None:
    path = Path(base) / "README.md"
    return path if path.is_file() else None


def _kept(base: str) -> Mapping[str, list[str]]:
    """The lines of what is kept of a base's front matter, by its names."""
    path = _card_path(base)
    if path is None:
        return {}
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(LONGEST)
    except OSError:
        return {}
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    found: dict[str, list[str]] = {}
    name = None
    for line in lines[1:]:
        if line.strip() == "---":
            return found
        # A name begins a line; what belongs to it is indented, or an item of its list.
        if line[:1] not in ("", " ", "\t", "-", "#"):
            name = line.partition(":")[0].strip()
            found[name] = []
        if name is not None and line.isprintable():
            found[name].append(line)
    return {}
