"""Bounds of what a model's config may ask for, before transformers builds what it describes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

#: The most modules of one kind (layers, experts, heads) in a config that transformers is asked to
#: build a model of. The largest known models have 512 experts in a layer and 200 layers.
MAX_MODULES = 2048
#: The most experts of all layers together.
MAX_EXPERTS = 1 << 17
#: The largest other number of a config: sizes, tokens, positions.
LARGEST_NUMBER = 1 << 31
#: The most numbers and names in a config.
MAX_VALUES = 1 << 20
#: Positions beyond this change nothing about a model's modules; some models make tables of them.
MAX_POSITIONS = 4096

#: Numbers under these names count modules.
_COUNTS = re.compile(
    r"layer|block|expert|depth|stage|head|branch|tower|group|codebook|quantizer|adapter"
)
#: Of those, the ones that say how large something is or which one it is.
_SIZES = re.compile(
    r"vocab|(size|dim|width|length|len|capacity|ids?|index|tokens?|ctx|positions?|embd|inner|channels|"
    r"samples|rank|window|freq|period|step|interval|offset|threshold|bytes)$"
)
#: What lies under these names builds no modules; it can name every one of them.
_BESIDE = {"quantization_config", "compression_config"}
#: Numbers under these names are lengths of tables of positions.
_POSITIONS = re.compile(r"position_embeddings$|^n_positions$|^n_ctx$|^max_(seq|source|target)")
#: Numbers under these names are written out as a table by the config itself.
_LABELS = re.compile(r"^num_labels$")
MAX_LABELS = 1 << 17


def is_modest(config: Any) -> bool:
    """Whether the model that a config describes has no more modules than any known one.

    Args:
        config: what `config.json` holds.

    Returns:
        False where a number that counts modules is too large, alone or the layers times the
        experts, and where any number or the config itself is.
    """
    layers, experts, values = 1, 0, 0
    for name, value in _values(config):
        values += 1
        if values > MAX_VALUES:
            return False
        # Nothing is counted in floating point.
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if abs(value) > LARGEST_NUMBER:
            return False
        if _LABELS.search(name) and value > MAX_LABELS:
            return False
        if _COUNTS.search(name) and not _SIZES.search(name):
            if value > MAX_MODULES:
                return False
            if "expert" in name:
                experts = max(experts, int(value))
            elif "head" not in name:
                layers = max(layers, int(value))
    return layers * experts <= MAX_EXPERTS


def with_few_positions(config: Any) -> Any:
    """A config whose tables of positions are short, which changes no module's name.

    Args:
        config: what `config.json` holds.

    Returns:
        The same where they are short already, else a changed copy.
    """
    if isinstance(config, dict):
        changed = {name: _few(name, with_few_positions(value)) for name, value in config.items()}
        return config if changed == config else changed
    return config


def _few(name: str, value: Any) -> Any:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if is_number and value > MAX_POSITIONS and _POSITIONS.search(name):
        return MAX_POSITIONS
    return value


def _values(config: Any) -> Iterator[tuple[str, Any]]:
    """Every value of a config with the name that it, or the list that it is in, has.

    A list counts as a number as well: that of its members.
    """
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(item for item in value.items() if item[0] not in _BESIDE)
            yield name, None
        elif isinstance(value, list):
            waiting.extend((name, member) for member in value)
            yield name, len(value)
        else:
            yield name, value
