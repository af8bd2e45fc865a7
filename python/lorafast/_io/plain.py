"""Values as plain objects: dicts, lists, texts and numbers, as JSON has them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def to_plain(value: Any) -> Any:
    """Dataclasses as dicts, arrays and tuples as lists, paths and keys as text.

    What has a `to_dict` of its own is what that says.
    """
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return fields_of(value)
    if isinstance(value, Mapping):
        return {_key(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.tolist() if hasattr(value, "tolist") else value


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, each as plain objects."""
    return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}


def _key(key: Any) -> str:
    return f"{key:g}" if isinstance(key, float) else str(key)


def without_non_finite(value: Any) -> Any:
    """Plain objects with `None` in place of NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_non_finite(item) for item in value]
    return value
