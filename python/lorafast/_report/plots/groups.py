"""Groups of modules that share a line of a picture: those of one layer, or of similar layers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorafast._analysis.records import ModuleAnalysis


def group_modules(modules: Sequence[ModuleAnalysis], most: int) -> dict[str, list[ModuleAnalysis]]:
    """Modules by what they are called within their blocks, in at most so many groups.

    Those of one layer; else of layers whose names differ in numbers (the experts'); else of one
    last part of the name; else all together.
    """
    layers = [module.layer for module in modules]
    for names in (
        layers,
        [re.sub(r"(?<![^.])\d+(?![^.])", "*", layer) for layer in layers],
        [layer.rpartition(".")[2] for layer in layers],
    ):
        groups: dict[str, list[ModuleAnalysis]] = {}
        for name, module in zip(names, modules, strict=True):
            groups.setdefault(name, []).append(module)
        if len(groups) <= most:
            return groups
    return {"all modules": list(modules)}
