"""The bytes of a fixed set of merges: a change that is meant to change no result changes none here.

`digests.json` holds the SHA-256 of every weight file, index and config that the merges of
`digest_cases.py` write. It is written by

    PYTHONPATH=tests python tests/conformance/test_digests.py --write

which is right where a case is new, or where results are meant to change and the changelog says so;
never to make a failing test pass. `inputs` is the digest of a case's own files: where that differs,
the makers of inputs have changed, not the merge.

The bytes are the same for any number of threads and on every processor, so that one table serves
all. Left out is what is not promised to be: PiSSA, OLoRA and KaSA (they decompose the base's
weights, which is off by other roundings on processors with other vectors), AMX, and torch's
devices.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafast
import pytest
from digest_cases import CASES, Case
from support.files import snapshot
from support.fixed_inputs import pickle

TABLE = Path(__file__).with_name("digests.json")
THREADS = (1, 3)


def digests(folder: Path) -> dict[str, str]:
    """Of the weights, their index and the config."""
    return {
        name: digest
        for name, digest in snapshot(folder).items()
        if name.endswith((".safetensors", ".index.json")) or name == "config.json"
    }


def carry_out(case: Case, folder: Path) -> tuple[str, dict[int, dict[str, str]]]:
    """The digest of the inputs, and by the number of threads those of what is written."""
    inputs = folder / "inputs"
    base = case.base.write(inputs / "base")
    adapters = [
        adapter.write(inputs / f"adapter-{number}") for number, adapter in enumerate(case.adapters)
    ]
    given = hashlib.sha256(json.dumps(snapshot(inputs)).encode()).hexdigest()
    for adapter, path in zip(case.adapters, adapters, strict=True):
        if adapter.pickled:
            pickle(path)
    written = {}
    for threads in THREADS:
        output = folder / f"merged-{threads}"
        options: dict[str, Any] = {"threads": threads, "report": False}
        lorafast.merge(base, adapters, output, sync=False, **options, **case.options)
        if case.subtract is not None:
            merged, output = output, folder / f"rest-{threads}"
            original = base if case.subtract.get("original") else None
            rest = options | dict(case.subtract) | {"original": original}
            lorafast.subtract(merged, adapters, output, **rest)
        written[threads] = digests(output)
    return given, written


@pytest.fixture(scope="module")
def table() -> Mapping[str, Any]:
    known: dict[str, Any] = json.loads(TABLE.read_text())
    return known


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_those_of_the_table(
    table: Mapping[str, Any], tmp_path: Path, name: str
) -> None:
    inputs, written = carry_out(CASES[name], tmp_path)
    expected = table[name]
    assert inputs == expected["inputs"], "the inputs are others, whatever the merge does"
    for threads, files in written.items():
        assert files == expected["files"], f"with {threads} threads"


def test_the_table_has_every_case_once_and_no_other(table: Mapping[str, Any]) -> None:
    assert list(table) == list(CASES)


def write() -> None:
    rows = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            inputs, written = carry_out(case, Path(folder))
        files = written[THREADS[0]]
        assert all(other == files for other in written.values()), f"{name}: threads change bytes"
        rows[name] = {"inputs": inputs, "files": files}
    TABLE.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/conformance/test_digests.py --write")
    write()
