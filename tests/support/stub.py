"""The dictionaries that the core's stub promises, and what a value has that they do not say."""

from __future__ import annotations
import __future__

import ast
import typing
from collections.abc import Iterator, Sequence
from importlib import resources
from types import UnionType
from typing import Any, Literal, NotRequired, Union, get_args, get_origin


def _stub() -> dict[str, Any]:
    """The names of `_core_types.pyi`, whose annotations are texts."""
    text = resources.files("lorafast").joinpath("_core_types.pyi").read_text(encoding="utf-8")
    tree = ast.parse(text)
    # Its only name that there is for type checkers alone.
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            node.names = [alias for alias in node.names if alias.name != "type_check_only"]
    module = {"type_check_only": lambda each: each, "__name__": "stub"}
    flags = __future__.annotations.compiler_flag
    exec(compile(tree, "_core_types.pyi", "exec", flags, dont_inherit=True), module)
    return module


class Shapes:
    """Holds values against types.

    Attributes:
        seen: the names of the dictionaries that a value was held against.
    """

    def __init__(self) -> None:
        self.stub = _stub()
        self.types = {n: each for n, each in self.stub.items() if typing.is_typeddict(each)}
        self.seen: set[str] = set()

    def differences(self, value: Any, expected: Any, where: str = "") -> Iterator[str]:
        """What a value has that its type does not allow, and what it lacks."""
        if isinstance(expected, str):
            expected = self.types[expected]
        origin, arguments = get_origin(expected), get_args(expected)
        if origin is NotRequired:
            yield from self.differences(value, arguments[0], where)
        elif typing.is_typeddict(expected):
            yield from self._fields(value, expected, where or expected.__name__)
        elif origin in (Union, UnionType):
            found = [list(self.differences(value, member, where)) for member in arguments]
            if all(found):
                # What is nearest tells most.
                yield from found[0] if value is not None else [f"{where} is None"]
        elif origin is list:
            # Arrays of Rust that have a length of their own cross as tuples.
            if isinstance(value, list | tuple):
                yield from self._items(value, [arguments[0]] * len(value), where)
            else:
                yield f"{where} is {value!r}, no list"
        elif origin is tuple and isinstance(value, tuple) and len(value) == len(arguments):
            yield from self._items(value, arguments, where)
        elif origin is dict and isinstance(value, dict):
            for key, item in value.items():
                yield from self.differences(key, arguments[0], f"{where} key")
                yield from self.differences(item, arguments[1], f"{where}[{key}]")
        elif not _is_of(value, expected):
            yield f"{where} is {value!r}, no {expected}"

    def _items(self, values: Any, types: Sequence[Any], where: str) -> Iterator[str]:
        for position, (item, each) in enumerate(zip(values, types, strict=True)):
            yield from self.differences(item, each, f"{where}[{position}]")

    def _fields(self, value: Any, expected: Any, where: str) -> Iterator[str]:
        self.seen.add(expected.__name__)
        if not isinstance(value, dict):
            yield f"{where} is {value!r}, no dictionary"
            return
        types = typing.get_type_hints(expected, self.stub, include_extras=True)
        required = {key for key, each in types.items() if get_origin(each) is not NotRequired}
        yield from (f"{where} has no {key}" for key in sorted(required - value.keys()))
        yield from (f"{where} has {key}" for key in sorted(value.keys() - types.keys()))
        for key in value.keys() & types.keys():
            yield from self.differences(value[key], types[key], f"{where}.{key}")


def _is_of(value: Any, expected: Any) -> bool:
    """Whether a value is of a plain type; an int passes for a float, and a bool not for an int."""
    if get_origin(expected) is Literal:
        return value in get_args(expected)
    return expected is Any or type(value) is expected or (expected is float and type(value) is int)
