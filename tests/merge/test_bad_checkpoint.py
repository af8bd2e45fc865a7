"""A broken or missing base is refused by name before a byte is written."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import pytest
from support.files import encode, layout, read_safetensors, tensor, write_safetensors
from support.handmade import make_adapter, make_base, rewrite_header
from support.refusal import refuses

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
UP_PROJ = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["absent", "absent/model", "absent.safetensors"])
def test_no_such_base(tmp_path: Path, adapter: Path, name: str) -> None:
    missing = tmp_path / name
    refuses(tmp_path, FileNotFoundError, missing, adapter, str(missing))
    refuses_again = tmp_path / "text"
    refuses_again.mkdir()
    refuses(refuses_again, FileNotFoundError, str(missing), adapter, str(missing))


def test_a_directory_without_a_checkpoint(tmp_path: Path, adapter: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    refuses(tmp_path, (lorafast.CheckpointError, FileNotFoundError), empty, adapter, str(empty))


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1, -1000])
def test_a_truncated_file(tmp_path: Path, base: Path, adapter: Path, kept: int) -> None:
    file = base / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:kept])
    assert file.stat().st_size < len(raw)
    refuses(tmp_path, lorafast.CheckpointError, base, adapter, "model.safetensors")


def test_a_truncated_shard_is_named(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path / "sharded", shards=3)
    shard = base / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    refuses(tmp_path, lorafast.CheckpointError, base, adapter, shard.name)


def test_bytes_after_the_last_tensor(tmp_path: Path, base: Path, adapter: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    refuses(tmp_path, lorafast.CheckpointError, base, adapter, "model.safetensors")


@pytest.mark.parametrize("length", [10**6, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8])
def test_a_header_longer_than_the_file(
    tmp_path: Path, base: Path, adapter: Path, length: int
) -> None:
    file = base / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    refuses(tmp_path, lorafast.CheckpointError, base, adapter, "model.safetensors", "header")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"not json",
        b"[]",
        b"null",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"\xff": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [18446744073709551616], "data_offsets": [0, 4]}}',
    ],
    ids=range(16),
)
def test_a_header_that_says_nothing_sound(
    tmp_path: Path, base: Path, adapter: Path, header: bytes
) -> None:
    (base / "model.safetensors").write_bytes(encode(header, b"\0" * 4))
    refuses(tmp_path, lorafast.CheckpointError, base, adapter, "model.safetensors")


def overlap(header: dict[str, Any]) -> None:
    begin, end = header[Q_PROJ]["data_offsets"]
    header[UP_PROJ]["data_offsets"] = [begin, begin + 4 * 50 * 20]
    assert end < begin + 4 * 50 * 20


def past_the_end(header: dict[str, Any]) -> None:
    last = max(
        (entry for name, entry in header.items() if name != "__metadata__"),
        key=lambda entry: entry["data_offsets"],
    )
    last["data_offsets"][1] += 80
    last["shape"][0] += 20


def hole(header: dict[str, Any]) -> None:
    header[UP_PROJ]["data_offsets"] = [2**40, 2**40 + 4 * 50 * 20]


def backwards(header: dict[str, Any]) -> None:
    header[UP_PROJ]["data_offsets"].reverse()


def too_short(header: dict[str, Any]) -> None:
    header[UP_PROJ]["shape"] = [51, 20]


def too_long(header: dict[str, Any]) -> None:
    header[UP_PROJ]["shape"] = [49, 20]


def other_dtype(header: dict[str, Any]) -> None:
    header[UP_PROJ]["dtype"] = "F16"


@pytest.mark.parametrize(
    "change", [overlap, past_the_end, hole, backwards, too_short, too_long, other_dtype]
)
def test_offsets_and_lengths_that_cannot_be(
    tmp_path: Path, base: Path, adapter: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    rewrite_header(base / "model.safetensors", change)
    named = {past_the_end: "truncated", hole: "belong to no tensor"}.get(change, UP_PROJ)
    refuses(tmp_path, lorafast.CheckpointError, base, adapter, "model.safetensors", named)


def test_one_name_twice(tmp_path: Path, base: Path, adapter: Path) -> None:
    file = base / "model.safetensors"
    header, body = layout(read_safetensors(file))
    text = json.dumps(header).replace("model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj")
    assert text.count(f'"{UP_PROJ}"') == 2
    file.write_bytes(encode(text, body))
    refuses(tmp_path, lorafast.CheckpointError, base, adapter, "model.safetensors", UP_PROJ)


def change_index(base: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = base / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_base(tmp_path / "sharded", shards=3)


def test_a_shard_is_missing(tmp_path: Path, sharded: Path, adapter: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refuses(
        tmp_path,
        (lorafast.CheckpointError, FileNotFoundError),
        sharded,
        adapter,
        "model-00002-of-00003.safetensors",
    )


@pytest.mark.parametrize("kind", ["parent", "absolute", "inner parent"])
def test_the_index_leaves_its_directory(
    tmp_path: Path, sharded: Path, adapter: Path, kind: str
) -> None:
    outside = tmp_path / "outside.safetensors"
    (sharded / "model-00002-of-00003.safetensors").rename(outside)
    (sharded / "inner").mkdir()
    name = {
        "parent": "../outside.safetensors",
        "absolute": str(outside),
        "inner parent": "inner/../../outside.safetensors",
    }[kind]

    def change(index: dict[str, Any]) -> None:
        weight_map = index["weight_map"]
        for key, value in weight_map.items():
            if value == "model-00002-of-00003.safetensors":
                weight_map[key] = name

    change_index(sharded, change)
    refuses(tmp_path, lorafast.CheckpointError, sharded, adapter, "index.json", name)


def test_the_index_names_a_tensor_that_its_shard_lacks(
    tmp_path: Path, sharded: Path, adapter: Path
) -> None:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"]["model.extra.weight"] = "model-00001-of-00003.safetensors"

    change_index(sharded, change)
    refuses(tmp_path, lorafast.CheckpointError, sharded, adapter, "model.extra.weight")


def test_one_name_in_two_shards(tmp_path: Path, sharded: Path, adapter: Path) -> None:
    shard = sharded / "model-00003-of-00003.safetensors"
    tensors = read_safetensors(shard)
    assert Q_PROJ not in tensors
    write_safetensors(shard, tensors | {Q_PROJ: tensor([[1.0]])})
    refuses(tmp_path, lorafast.CheckpointError, sharded, adapter, Q_PROJ)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\xff"]
)
def test_an_index_that_says_nothing_sound(
    tmp_path: Path, sharded: Path, adapter: Path, text: str
) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    refuses(tmp_path, lorafast.CheckpointError, sharded, adapter, "model.safetensors.index.json")


@pytest.mark.parametrize("dtype", ["I64", "I32", "U8", "BOOL"])
def test_a_weight_of_integers_cannot_be_merged_into(
    tmp_path: Path, adapter: Path, dtype: str
) -> None:
    file = make_base(tmp_path / "base") / "model.safetensors"
    tensors = read_safetensors(file)
    write_safetensors(file, tensors | {Q_PROJ: tensor([[1] * 20] * 24, dtype)})
    refuses(tmp_path, lorafast.LorafastError, file.parent, adapter, Q_PROJ, dtype)
