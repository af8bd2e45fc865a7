"""Values as plain objects: dicts, lists, texts and numbers, as JSON has them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

#: A list of numbers, null, true and false in indented JSON, and what stands between its lines.
NUMBERS = re.compile(r"\[\n([\sa-z\d.,+\-eE]*)\]")
LINES = re.compile(r"\n\s*")


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


def fields_of(value: Any, but: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass, but some, each as plain objects."""
    names = (field.name for field in fields(value))
    return {name: to_plain(getattr(value, name)) for name in names if name not in but}


def json_text(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Plain objects as strict, indented JSON in which a list of numbers is one line.

    NaN and infinities are null.

    Args:
        value: the objects.
        default: makes a plain object of what is none.
    """
    text = json.dumps(without_non_finite(value), indent=2, allow_nan=False, default=default)
    # A line for each number would be twice the file. No text of JSON holds a line break.
    return NUMBERS.sub(lambda found: f"[{LINES.sub(' ', found[1].strip())}]", text)


def utf8(text: str) -> str:
    """A text that can be UTF-8; bytes of a file's name that are none are written as escapes."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


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
