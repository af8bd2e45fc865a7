"""Safetensors files read and written by hand, so that malformed ones can be made too."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ITEM_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class Tensor:
    """One tensor as it stands in a file: the format's name of its dtype, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def float64(self) -> NDArray[np.float64]:
        """The values, widened without loss."""
        return widen(self.dtype, self.data).reshape(self.shape)

    def bits16(self) -> NDArray[np.uint16]:
        assert ITEM_SIZES[self.dtype] == 2, self.dtype
        return np.frombuffer(self.data, "<u2").reshape(self.shape)


def widen(dtype: str, data: bytes) -> NDArray[np.float64]:
    if dtype == "BF16":
        bits = np.frombuffer(data, "<u2").astype("<u4") << np.uint32(16)
        return bits.view("<f4").astype(np.float64)
    return np.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float64)


def narrow(values: NDArray[Any], dtype: str) -> bytes:
    """Round float64 values once, to nearest even, to the bytes of `dtype`."""
    values = np.ascontiguousarray(values, dtype=np.float64)
    with np.errstate(over="ignore"):
        if dtype != "BF16":
            return values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
        # float64 -> float32 rounded to odd -> bfloat16 to nearest even is one rounding in effect.
        single = values.astype("<f4")
    bits = single.view("<u4").copy()
    too_far = np.abs(single.astype(np.float64)) > np.abs(values)
    bits[too_far] -= 1
    bits[single.astype(np.float64) != values] |= 1
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(
        16
    )
    rounded[~np.isfinite(values)] = bits[~np.isfinite(values)] >> np.uint32(16)
    return rounded.astype("<u2").tobytes()


def tensor(values: Any, dtype: str = "F32") -> Tensor:
    array = np.asarray(values)
    if dtype in {"F64", "F32", "F16", "BF16"}:
        return Tensor(dtype, array.shape, narrow(array, dtype))
    names = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "u1"}
    return Tensor(dtype, array.shape, array.astype(names[dtype]).tobytes())


def encode(header: str | bytes, body: bytes) -> bytes:
    """A file with this header text, sound or not, and this body."""
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + body


def layout(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], bytes]:
    """The header of a sound file as a dict, and its body."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    parts: list[bytes] = []
    offset = 0
    for name, value in tensors.items():
        end = offset + len(value.data)
        header[name] = {
            "dtype": value.dtype,
            "shape": list(value.shape),
            "data_offsets": [offset, end],
        }
        parts.append(value.data)
        offset = end
    return header, b"".join(parts)


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    header, body = layout(tensors, metadata)
    text = json.dumps(header)
    path.write_bytes(encode(text + " " * (-len(text) % 8), body))
    return path


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and the offset of the body."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def read_safetensors(path: Path) -> dict[str, Tensor]:
    header, start = read_header(path)
    raw = path.read_bytes()
    return {
        name: Tensor(
            entry["dtype"],
            tuple(entry["shape"]),
            raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, or of a directory's file or shards through its index."""
    if path.is_file():
        return read_safetensors(path)
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if indexes:
        (index,) = indexes
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        shards = {name: read_safetensors(path / name) for name in sorted(set(weight_map.values()))}
        assert {(n, s) for s, tensors in shards.items() for n in tensors} == set(
            weight_map.items()
        ), "the index and the shards hold different tensors"
        return {name: shards[shard][name] for name, shard in weight_map.items()}
    (file,) = path.glob("*.safetensors")
    return read_safetensors(file)


def snapshot(path: Path) -> dict[str, str]:
    """Every file, folder and link below `path`, with the SHA-256 of what it holds."""
    found: dict[str, str] = {}
    for entry in sorted(path.rglob("*")):
        name = str(entry.relative_to(path))
        if entry.is_symlink():
            found[name] = f"link to {entry.readlink()}"
        elif entry.is_dir():
            found[name] = "folder"
        elif entry.stat().st_size > 1 << 30:
            found[name] = f"{entry.stat().st_size} bytes"
        else:
            found[name] = hashlib.sha256(entry.read_bytes()).hexdigest()
    return found


def backdate(path: Path) -> Path:
    """Files that nobody has just written, so that no reader waits for their writer."""
    for file in [path] if path.is_file() else path.rglob("*"):
        os.utime(file, (1_700_000_000, 1_700_000_000))
    return path
