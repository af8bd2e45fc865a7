"""A merge that must be refused, and must leave everything as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lorafast
import pytest

from support.files import snapshot

PREVIOUS = {"model.safetensors": b"an earlier model", "config.json": b"{}", "notes.txt": b"mine"}


def make_previous(output: Path) -> None:
    output.mkdir()
    for name, content in PREVIOUS.items():
        (output / name).write_bytes(content)


def refuses(
    folder: Path,
    error: type[BaseException] | tuple[type[BaseException], ...],
    base: Path | str,
    adapters: Any,
    *says: str,
    planned: bool = True,
    **options: Any,
) -> BaseException:
    """Assert that the merge raises `error` and leaves the disk as it was.

    It is tried with an output that does not exist, and with one that holds an earlier model and
    may be overwritten. Everything below `folder` must be the same afterwards.

    Args:
        folder: holds base, adapters and output.
        error: what is raised.
        base: as for `lorafast.merge`.
        adapters: as for `lorafast.merge`.
        says: what the message must contain, whatever the case.
        planned: whether `lorafast.plan` raises it too.
        options: go to `lorafast.merge`.
    """
    before = snapshot(folder)
    with pytest.raises(error) as absent:
        lorafast.merge(base, adapters, folder / "refused", **options)
    assert snapshot(folder) == before, "a refused merge left something behind"

    make_previous(folder / "previous")
    before = snapshot(folder)
    with pytest.raises(error) as existing:
        lorafast.merge(base, adapters, folder / "previous", overwrite=True, **options)
    assert snapshot(folder) == before, "a refused merge changed its output"

    raised = [absent.value, existing.value]
    if planned:
        options = {n: v for n, v in options.items() if n in {"strategy", "weights", "dtype"}}
        with pytest.raises(error) as unplanned:
            lorafast.plan(base, adapters, **options)
        assert snapshot(folder) == before
        raised.append(unplanned.value)
    for value in raised:
        message = str(value).lower()
        for text in says:
            assert text.lower() in message, f"{text!r} is not in {message!r}"
        assert "panicked" not in message
    return raised[0]
