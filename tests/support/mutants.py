"""Modules with one statement taken out."""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

#: Calls that order what streams and the host do, or keep memory for them.
ORDERING = {"wait_stream", "record_stream", "synchronize", "wait_event"}


@dataclass(frozen=True)
class Statement:
    line: int
    text: str


def ordering_statements(module: ModuleType) -> list[Statement]:
    """Every statement of a module that orders something, and where an event is noted."""
    found = []
    for node in ast.walk(ast.parse(source_of(module))):
        call = node.value if isinstance(node, ast.Expr | ast.Assign) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            noted = isinstance(node, ast.Assign) and call.func.attr == "record_event"
            if noted or (isinstance(node, ast.Expr) and call.func.attr in ORDERING):
                found.append(Statement(node.lineno, ast.unparse(node)))
    return sorted(found, key=lambda each: each.line)


def source_of(module: ModuleType) -> str:
    assert module.__file__ is not None
    return Path(module.__file__).read_text()


class _Without(ast.NodeTransformer):
    def __init__(self, statement: Statement) -> None:
        self.statement, self.removed = statement, 0

    def visit(self, node: Any) -> Any:
        line, text = self.statement.line, self.statement.text
        if isinstance(node, ast.stmt) and node.lineno == line and ast.unparse(node) == text:
            self.removed += 1
            return ast.copy_location(ast.Pass(), node)
        return self.generic_visit(node)


def without(module: ModuleType, statement: Statement) -> ModuleType:
    """The module as it would be without a statement."""
    change = _Without(statement)
    tree = ast.fix_missing_locations(change.visit(ast.parse(source_of(module))))
    assert change.removed == 1, statement
    mutant = ModuleType(module.__name__)
    mutant.__file__ = module.__file__
    # Dataclasses look their module up by its name.
    original = sys.modules[module.__name__]
    sys.modules[module.__name__] = mutant
    try:
        exec(compile(tree, str(module.__file__), "exec"), mutant.__dict__)
    finally:
        sys.modules[module.__name__] = original
    return mutant
