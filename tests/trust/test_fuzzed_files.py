"""Headers, configs and indexes changed at random, read in this process."""

from __future__ import annotations

import json
import os
import random as chance
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import pytest
from lorafast._io.transformers_renames import renaming_rules
from support.handmade import make_adapter, make_base
from support.trust.figures import Figures, count, generator

#: Seconds in which a small file is read, whatever it says.
LIMIT = 5.0
ALLOWED = (lorafast.LorafastError, OSError, ValueError)
NUMBERS = (0, 1, -1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 1.5, -0.0, 1e308, 1e999)
TEXTS = (
    "", "F32", "BF16", "F99", "\x00", "\ud800", "é" * 10, "../../etc/passwd", "/dev/zero", "~",
    "lora_A", "base_model.model.", ".*", "(", "(.*)*x", "model.safetensors", "x" * 5000, "NaN",
)  # fmt: skip
LITERALS = (
    b"null",
    b"true",
    b"NaN",
    b"Infinity",
    b"[]",
    b"{}",
    b"1e999",
    b'"\\ud800"',
    b'"\\u0000"',
)


def some_value(random: chance.Random, depth: int = 0) -> Any:
    """A value of JSON that may stand where another is expected."""
    kind = random.randrange(8 if depth < 2 else 5)
    if kind < 2:
        return random.choice(NUMBERS)
    if kind < 4:
        return random.choice(TEXTS)
    if kind == 4:
        return random.choice((None, True, False))
    values = [some_value(random, depth + 1) for _ in range(random.randrange(4))]
    if kind == 5:
        return values
    if kind == 6:
        return {random.choice(TEXTS): value for value in values}
    return [random.choice(NUMBERS)] * random.choice((1, 2, 9, 300))


def changed_value(value: Any, random: chance.Random) -> Any:  # noqa: PLR0911 (one for each kind)
    """The value with one change somewhere in it."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(list(value))
        change = random.randrange(6)
        if change == 0:
            return {k: v for k, v in value.items() if k != key}
        if change == 1:
            return value | {random.choice(TEXTS): value[key]}
        if change == 2:
            other = random.choice(list(value))
            return value | {key: value[other], other: value[key]}
        return value | {key: changed_value(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.7:
        place = random.randrange(len(value))
        return [*value[:place], changed_value(value[place], random), *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and random.random() < 0.5:
        return value + random.choice((-1, 1, 4, -8, 1 << 20))
    if isinstance(value, str) and value and random.random() < 0.5:
        place = random.randrange(len(value))
        return value[:place] + random.choice(("", ".", "0", "é", "\n", "lora_B")) + value[place:]
    return some_value(random)


def changed_bytes(content: bytes, random: chance.Random) -> bytes:
    """The bytes with some of them changed, taken out, doubled, or other words of JSON put in."""
    raw = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5))):
        place = random.randrange(len(raw) + 1)
        change = random.randrange(6)
        if change == 0 and raw:
            raw[place % len(raw)] = random.randrange(256)
        elif change == 1:
            del raw[place : place + random.choice((1, 2, 20))]
        elif change == 2:
            raw[place:place] = raw[max(0, place - random.randrange(40)) : place]
        elif change == 3:
            raw[place:place] = random.choice(LITERALS)
        elif change == 4:
            raw[place:place] = random.choice((b"[", b"{", b'"')) * random.choice((1, 100, 2000))
        else:
            del raw[place:]
    return bytes(raw)


def fuzzed(path: Path, original: bytes, random: chance.Random) -> bytes:
    """One changed version of a file."""
    if path.suffix == ".json":
        if random.random() < 0.4:
            return changed_bytes(original, random)
        value = json.loads(original)
        for _ in range(random.choice((1, 1, 2, 4))):
            value = changed_value(value, random)
        return json.dumps(value).encode()
    (length,) = struct.unpack("<Q", original[:8])
    header, body = original[8 : 8 + length], original[8 + length :]
    way = random.random()
    if way < 0.25:
        header = changed_bytes(header, random)
    elif way < 0.85:
        value = json.loads(header)
        for _ in range(random.choice((1, 1, 2, 4))):
            value = changed_value(value, random)
        header = json.dumps(value).encode()
    elif way < 0.93:
        body = body[: random.randrange(len(body))]
    else:
        length = random.choice((0, 1, len(header) - 1, len(original), 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", length) + header + body
    return struct.pack("<Q", len(header)) + header + body


def put(path: Path, content: bytes) -> None:
    """Makes the file anew, as one that changed long ago: what changed just now is waited for."""
    path.unlink()
    path.write_bytes(content)
    os.utime(path, (1_600_000_000, 1_600_000_000))


@pytest.mark.alone
def test_a_changed_file_is_read_or_refused(
    tmp_path: Path, figures: Callable[[str], Figures]
) -> None:
    told = figures("fuzzed files")
    random = generator("fuzzed files")
    base = make_base(tmp_path / "base", shards=2)
    adapter = make_adapter(tmp_path / "adapter", rank_pattern={"q_proj": 4}, alpha_pattern={"x": 1})
    files = [
        base / "model-00001-of-00002.safetensors",
        base / "model.safetensors.index.json",
        base / "config.json",
        adapter / "adapter_model.safetensors",
        adapter / "adapter_config.json",
    ]
    originals = {path: path.read_bytes() for path in files}
    # A plan that fits nothing asks transformers for names; importing it and the model's class takes
    # seconds, once.
    renaming_rules(json.loads(originals[base / "config.json"]))
    slowest = 0.0
    kept = tmp_path / "wrong"
    for number in range(count("fuzzed_files", 300)):
        path = random.choice(files)
        content = fuzzed(path, originals[path], random)
        put(path, content)
        calls = (
            ("inspect", lambda path=path: lorafast.inspect(path.parent)),
            ("plan", lambda: lorafast.plan(base, adapter)),
        )
        for name, call in calls:
            begun = time.monotonic()
            try:
                call()
                told.add("read")
            except ALLOWED as error:
                told.add("refused")
                told.expect(str(error).strip(), f"{number}: {name}: an error without a word")
                told.expect(len(str(error)) < 100_000, f"{number}: {name}: says too much")
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                kept.mkdir(exist_ok=True)
                (kept / f"{number}-{path.name}").write_bytes(content)
                told.wrong.append(f"{number}: {name} of {path.name}: {error!r:.200}")
            took = time.monotonic() - begun
            slowest = max(slowest, took)
            told.expect(took < LIMIT, f"{number}: {name} of {path.name} took {took:.1f} s")
        put(path, originals[path])
    told.counts["slowest in ms"] = round(1000 * slowest)
    assert lorafast.plan(base, adapter) is not None, "the files are sound again"
    shutil.rmtree(tmp_path / "adapter")
    told.settle()
