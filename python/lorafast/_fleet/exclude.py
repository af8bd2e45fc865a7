"""Patterns of paths that a scan leaves out, as those of `.gitignore` and ruff."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

#: What a pattern consists of: `**/`, `**`, `*`, `?`, a set of characters, any other character.
TOKEN = re.compile(r"\*\*/|\*\*|\*|\?|\[!?[^/][^\]/]*\]|.", re.DOTALL)


class Exclusion:
    """The paths below a root that some patterns match, with all that lies below them.

    A pattern without a slash is the name of a file or a directory at any depth. One with a slash
    is a path below the root, which may also be given as it was for the root, or as an absolute
    path. `*` and `?` stand for what has no slash, `[…]` for one of some characters, `**` for any
    number of directories, and a slash at the end means directories alone.
    """

    def __init__(self, patterns: Sequence[str], root: str) -> None:
        """Reads the patterns.

        Args:
            patterns: any number of them; one alone may be a text.
            root: the directory that they are about; it is never excluded itself.

        Raises:
            ValueError: a pattern is empty, or its set of characters makes no sense.
        """
        given = [patterns] if isinstance(patterns, str) else list(patterns)
        for pattern in given:
            if not pattern.strip("/"):
                raise ValueError(
                    f"the exclude pattern {pattern!r} is empty; give a path below the directory "
                    "that is searched, or a name, such as 'checkpoint-*'"
                )
        self._root = os.path.normpath(root)
        self._top = os.path.abspath(root)
        self._inside = self._top.rstrip(os.sep) + os.sep
        spelled = [own for pattern in given for own in self._spellings(pattern)]
        try:
            self._all = re.compile("|".join(map(_regex, spelled)), re.DOTALL) if spelled else None
        except re.error as error:
            raise ValueError(f"an exclude pattern cannot be read: {error}") from None

    def __bool__(self) -> bool:
        return self._all is not None

    def __call__(self, path: str, *, is_directory: bool) -> bool:
        """Whether a path is left out, itself or by a directory above it."""
        if self._all is None:
            return False
        whole = os.path.abspath(path)
        if not whole.startswith(self._inside):
            return False
        below = whole[len(self._inside) :].replace(os.sep, "/")
        return self._all.fullmatch(below + "/" * is_directory) is not None

    def _spellings(self, pattern: str) -> list[str]:
        """A pattern as one of paths below the root, in each way in which it can be meant."""
        own = pattern.replace(os.sep, "/").removeprefix("./")
        if "/" not in own.rstrip("/"):
            return [f"**/{own}"]
        found = [own.lstrip("/")]
        for directory in (self._root, self._top):
            above = directory.replace(os.sep, "/").rstrip("/") + "/"
            if own.startswith(above) and own != above:
                found.append(own.removeprefix(above))
        return found


def _regex(pattern: str) -> str:
    """A regular expression of a path, of which those of directories end in a slash."""
    only_directories = pattern.endswith("/")
    text = ""
    for token in TOKEN.findall(pattern.rstrip("/")):
        if token == "**/":
            text += "(?:.*/)?"
        elif token == "**":
            text += ".*"
        elif token == "*":
            text += "[^/]*"
        elif token == "?":
            text += "[^/]"
        elif len(token) > 1:
            inner = re.sub(r"[\\\[\]^]", r"\\\g<0>", token[1:-1])
            is_negated = inner.startswith("!") and len(inner) > 1
            text += f"[^/{inner[1:]}]" if is_negated else f"[{inner}]"
        else:
            text += re.escape(token)
    return f"(?:{text}{'/.*' if only_directories else '(?:/.*)?'})"
