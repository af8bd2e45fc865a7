"""The rules by which the installed transformers renames a model's tensors as it loads them.

The core has those of the common families built in. This asks transformers itself, for a base whose
names do not fit an adapter's otherwise.
"""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorafast._errors import raise_interruption
from lorafast._io.config_bounds import is_modest, with_few_positions
from lorafast._io.paths import is_directory, is_file

#: The classes whose patterns and replacements say all that they do.
PLAIN = {"WeightRenaming", "WeightConverter", "PrefixChange"}
#: The arguments of operations that change nothing as they are here.
HARMLESS: dict[str, Any] = {"num_shards_attribute": None, "check_dims": True}


def config_of(base: Path) -> dict[str, Any] | None:
    """The config beside a base, or `None` without one that can be read.

    Args:
        base: a model's directory, or a file in it.

    Raises:
        OSError: the config leads nowhere or may not be looked at.
    """
    path = (base if is_directory(base) else base.parent) / "config.json"
    if not is_file(path):
        return None
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def renaming_rules(config: dict[str, Any]) -> str | None:
    """The rules for a model, for `_core.plan_merge`.

    Args:
        config: its `config.json`.

    Returns:
        A JSON list of rules, each with `sources` and `targets` (regular expressions and
        replacements of names), `operations` (name, dimension, plain), `prefixes` and `special`;
        `None` where transformers or the model's class in it is missing, or has no rules, and where
        the config describes a model with more modules than any has: transformers builds it.
    """
    if find_spec("transformers") is None or find_spec("torch") is None:
        return None
    try:
        if not is_modest(config):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transforms = _transforms(with_few_positions(config))
    except Exception as error:
        raise_interruption(error)
        # The answer only helps: without it the names stay what they are, and the error that is on
        # its way says so.
        return None
    rules = [_rule(transform) for transform in transforms]
    return json.dumps(rules) if rules else None


def _transforms(described: dict[str, Any]) -> list[Any]:
    """What transformers would do to the names of this model, in order."""
    import torch
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping

    # As `AutoConfig.from_pretrained` does with what it has read.
    config = transformers.CONFIG_MAPPING[described["model_type"]].from_dict(described)
    names = getattr(config, "architectures", None) or []
    kinds = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    kind = kinds[0] if kinds else transformers.AutoModel
    make = getattr(kind, "_from_config", None) or kind.from_config
    with torch.device("meta"):
        return list(get_model_conversion_mapping(make(config)))


def _rule(transform: Any) -> dict[str, Any]:
    kind = type(transform).__name__
    operations = getattr(transform, "operations", None) or []
    scope, base = transform.scope_prefix, transform.base_model_prefix
    prefixes: list[str] = []
    if scope is not None:
        inner, outer = f"{scope}." if scope else "", f"{base}." if base else ""
        prefixes = [outer + inner, inner]
    return {
        "sources": list(transform.source_patterns),
        "targets": list(transform.target_patterns),
        "operations": [_operation(operation) for operation in operations],
        "prefixes": prefixes,
        "special": None if kind in PLAIN else kind,
    }


def _operation(operation: Any) -> dict[str, Any]:
    settings = {name: value for name, value in vars(operation).items() if name != "dim"}
    return {
        "name": type(operation).__name__,
        "dimension": getattr(operation, "dim", None),
        "plain": all(name in HARMLESS and HARMLESS[name] == settings[name] for name in settings)
        or type(operation).__name__ == "Transpose",
    }
