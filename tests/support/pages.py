"""Analyses, comparisons and fleets whose HTML pages are looked at, and a reader of pages."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
from lorafast._analysis.records import Finding
from lorafast._report.html import fleet_charts, fleet_groups

from support import records
from support.files import tensor
from support.handmade import make_adapter

ATTACK = '</td></script><img src=x onerror=alert(1)>&amp;\' "<button tabindex="-1">'
GPT = {
    path.replace("model.layers", "transformer.h"): place
    for path, place in records.places(2, ("attn.c_attn", "mlp.c_fc")).items()
}
#: Void elements, which have no end.
VOID = {"meta", "img", "input", "polyline", "wbr"}


def findings_of(paths: list[str], tensors: list[str]) -> list[Finding]:
    return [
        Finding("critical", "non_finite", tensors[0], 3.0, "B holds NaN."),
        *(Finding("note", "unused_rank", path, 2.0, "A smaller rank would do.") for path in paths),
        Finding("warning", "dead_module", "of.no.table", math.nan, "Dead."),
    ]


def analysis(blocks: int = 2, **options: Any) -> lorafast.AdapterAnalysis:
    where = options.pop("where", records.places(blocks))
    tensors = [f"base_model.model.{path}.lora_B.weight" for path in where]
    found = findings_of(list(where), tensors)
    return records.analysis(where, findings=found, size=16, rank=4, **options)


def comparison(count: int, blocks: int = 2) -> lorafast.Comparison:
    made = records.comparison([analysis(blocks, name=f"run-{i}", seed=i) for i in range(count)])
    made.findings.append(Finding("warning", "duplicate", None, 1.0, "run-0 and run-1 are one."))
    made.findings.append(Finding("note", "different_modules", None, 1.0, "run-1 has more."))
    return made


def of_two_architectures() -> lorafast.Comparison:
    llama = [analysis(name=f"llama-{i}", seed=i) for i in range(3)]
    gpt = [analysis(name=f"gpt-{i}", seed=i, where=GPT) for i in range(2)]
    made = records.comparison([*llama, *gpt])
    made.cosine[:3, 3:] = made.cosine[3:, :3] = 0.0
    return made


def write_fleet(root: Path, adapters: int = 4, blocks: int = 2) -> lorafast.Fleet:
    """Adapters of a Llama, of two GPTs of which one is wider, and one that holds NaN."""
    kinds: list[tuple[str, dict[str, tuple[int, int]]]] = [
        ("llama", dict.fromkeys(records.places(blocks), (16, 16))),
        ("gpt2", dict.fromkeys(GPT, (24, 8))),
        ("gpt2", dict.fromkeys(GPT, (36, 12))),
    ]
    for number, (base, shapes) in enumerate(kinds):
        for i in range(adapters):
            random = np.random.default_rng(10 * number + i)
            tensors = {}
            for path, (rows, columns) in shapes.items():
                a = random.normal(size=(2 + 2 * (i % 2), columns))
                b = random.normal(size=(rows, len(a))) / 9
                if number == 0 and i == 1 and path.endswith("0.self_attn.q_proj"):
                    b[:] = math.nan
                name = f"base_model.model.{path}.lora_"
                tensors[f"{name}A.weight"] = tensor(a.astype(np.float32), "F32")
                tensors[f"{name}B.weight"] = tensor(b.astype(np.float32), "F32")
            make_adapter(
                root / f"{base}-{number}" / f"run {i}", tensors, r=len(a), lora_alpha=8,
                base_model_name_or_path=base,
            )  # fmt: skip
    return lorafast.scan(root)


PAGES: dict[str, Callable[[], Any]] = {
    "analysis": analysis,
    "broken": lambda: analysis(fill=math.nan),
    "empty": lambda: records.analysis({}),
    "hostile": lambda: analysis(where={ATTACK: (None, ATTACK)}, name=ATTACK),
    "comparison": lambda: comparison(3),
    "two of one name": lambda: records.comparison([analysis(), analysis(seed=1)]),
    "two architectures": of_two_architectures,
}


@cache
def page_of(name: str) -> str:
    text: str = PAGES[name]().to_html()
    return text


def every_chart(fleet: lorafast.Fleet) -> list[Any]:
    """The charts of a fleet's page in their order."""
    cosine = lorafast.similarity(fleet, group_by_base=True)
    groups, _ = fleet_groups.matrices(fleet, cosine.names, np.asarray(cosine.matrix))
    return [*fleet_charts.charts(fleet), *groups]


class Tree(HTMLParser):
    """The elements of a page, each with its attributes, its text and what it is in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[dict[str, Any]] = []
        self._open: list[dict[str, Any]] = []
        # Plotly's script holds tags in strings.
        self.feed(re.sub(r"(<script[^>]*>).*?</script>", r"\1</script>", text, flags=re.DOTALL))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        inside = [each["tag"] for each in self._open]
        one = {"tag": tag, "text": "", "inside": inside, **dict(attrs)}
        self.elements.append(one)
        if tag not in VOID:
            self._open.append(one)

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for one in self._open:
            one["text"] += data

    def all(self, *tags: str) -> Iterator[dict[str, Any]]:
        return (one for one in self.elements if one["tag"] in tags)

    def tab_stops(self) -> list[dict[str, Any]]:
        """What the tabulator key reaches with every part of the page unfolded."""
        reached = [*self.all("a", "button", "input", "summary")]
        reached += [one for one in self.elements if "tabindex" in one and one not in reached]
        return [one for one in reached if one.get("tabindex", "0") == "0"]
