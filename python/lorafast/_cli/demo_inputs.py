"""Inputs for a demonstration, made from random numbers, and an independent check of their merge.

The base is a Llama-shaped checkpoint in bfloat16 in several shards; the adapters are what PEFT
writes. Needs numpy and nothing else: it has to run on a machine where lorafast is just installed,
and the check shares no code with the merge.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    Float64 = NDArray[np.float64]
    BFloat16Bits = NDArray[np.uint16]

MARKER = ".lorafast-demo"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama."""

    hidden: int = 1024
    intermediate: int = 2816
    layers: int = 4
    heads: int = 16
    key_value_heads: int = 4
    vocabulary: int = 8192
    shards: int = 3

    def linear(self, projection: str) -> tuple[int, int]:
        """Return (out, in) of one of a layer's projections."""
        key_value = self.hidden // self.heads * self.key_value_heads
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (key_value, self.hidden),
            "v_proj": (key_value, self.hidden),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }[projection]

    def module(self, layer: int, projection: str) -> str:
        """Return a projection's name in the model."""
        part = "self_attn" if projection in ATTENTION else "mlp"
        return f"model.layers.{layer}.{part}.{projection}"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the checkpoint, in the model's order."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden)
        }
        for layer in range(self.layers):
            shapes[f"model.layers.{layer}.input_layernorm.weight"] = (self.hidden,)
            shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (self.hidden,)
            for projection in (*ATTENTION, *FEED_FORWARD):
                shapes[f"{self.module(layer, projection)}.weight"] = self.linear(projection)
        shapes["model.norm.weight"] = (self.hidden,)
        shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        return shapes


@dataclass(frozen=True)
class DemoAdapter:
    """An adapter of the demonstration, and the weight it is merged with."""

    name: str
    rank: int
    alpha: int
    rslora: bool
    projections: tuple[str, ...]
    weight: float

    @property
    def scale(self) -> float:
        """α/r, or α/√r for rsLoRA (Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


ADAPTERS = (
    DemoAdapter("style", 16, 32, False, (*ATTENTION, *FEED_FORWARD), 0.7),
    DemoAdapter("facts", 8, 16, True, ("q_proj", "v_proj"), -0.3),
)


@dataclass(frozen=True)
class DemoInputs:
    """What `make_inputs` wrote."""

    directory: Path
    shape: ModelShape
    merged: Path
    """The directory for the merged model."""

    @property
    def base(self) -> Path:
        """The base checkpoint's directory."""
        return self.directory / "base"

    @property
    def adapters(self) -> list[Path]:
        """The adapters' directories, in the order of `ADAPTERS`."""
        return [self.directory / adapter.name for adapter in ADAPTERS]

    @property
    def weights(self) -> list[float]:
        """The adapters' weights."""
        return [adapter.weight for adapter in ADAPTERS]


@dataclass(frozen=True)
class TensorCheck:
    """One tensor of the merged model, against the same sum in float64."""

    name: str
    changed: bool
    weights: int
    identical: int
    """How many weights equal the float64 sum rounded once to bfloat16."""
    unexplained: int
    """How many are further from the sum than that rounding and a float32 sum can bring them."""

    @property
    def ok(self) -> bool:
        """Whether it is what lorafast promises: one rounding of a float32 sum."""
        if not self.changed:
            return self.identical == self.weights
        return self.unexplained == 0 and self.identical >= 0.999 * self.weights


def make_inputs(directory: Path, shape: ModelShape | None = None, *, seed: int = 0) -> DemoInputs:
    """Write a base checkpoint and two adapters of seeded random numbers.

    Args:
        directory: Where to; it is made. What an earlier demonstration left in it is replaced.
        shape: The model's sizes; 62 million parameters if None.
        seed: Of the random numbers.

    Raises:
        FileExistsError: The directory holds something else than an earlier demonstration.
    """
    if directory.exists() and any(directory.iterdir()) and not (directory / MARKER).exists():
        message = (
            f"{directory} is not empty and was not made by `lorafast demo`; "
            "name another directory with --output"
        )
        raise FileExistsError(message)
    inputs = DemoInputs(directory, shape or ModelShape(), directory / "merged")
    for path in (inputs.base, inputs.merged, *inputs.adapters):
        shutil.rmtree(path, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARKER).touch()
    random = np.random.default_rng(seed)
    _write_base(inputs.base, inputs.shape, random)
    for adapter, path in zip(ADAPTERS, inputs.adapters, strict=True):
        _write_adapter(path, adapter, inputs.shape, random)
    return inputs


def check_merge(inputs: DemoInputs) -> Iterator[TensorCheck]:
    """Compare some tensors of the merged model with a plain float64 computation."""
    shape = inputs.shape
    last = shape.layers - 1
    modules = [shape.module(0, "q_proj"), shape.module(last, "v_proj")]
    modules += [shape.module(0, "k_proj"), shape.module(last, "down_proj")]
    for module in modules:
        yield _check_module(inputs, module)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        before, after = (read_bfloat16(path, name) for path in (inputs.base, inputs.merged))
        identical = int(np.count_nonzero(before == after))
        yield TensorCheck(name, False, before.size, identical, before.size - identical)


def _check_module(inputs: DemoInputs, module: str) -> TensorCheck:
    name = f"{module}.weight"
    exact = from_bfloat16(read_bfloat16(inputs.base, name)).astype(np.float64)
    # The same sum without signs, by which the error of a sum in floating point is bounded: where
    # base and update cancel, a float32 sum is many units of the small result's last place off.
    magnitude = np.abs(exact)
    operations = 1
    for adapter, path in zip(ADAPTERS, inputs.adapters, strict=True):
        if module.rpartition(".")[2] in adapter.projections:
            file = path / "adapter_model.safetensors"
            prefix = f"base_model.model.{module}.lora_"
            factor_a = read_tensor(file, f"{prefix}A.weight").astype(np.float64)
            factor_b = read_tensor(file, f"{prefix}B.weight").astype(np.float64)
            coefficient = adapter.weight * adapter.scale
            exact += coefficient * (factor_b @ factor_a)
            magnitude += abs(coefficient) * (np.abs(factor_b) @ np.abs(factor_a))
            operations += adapter.rank + 2
    expected = round_to_bfloat16(exact)
    merged = read_bfloat16(inputs.merged, name)
    identical = int(np.count_nonzero(expected == merged))
    # Half a unit of bfloat16's last place, and the classic bound n·2⁻²⁴·Σ|terms| of the sum
    # (Higham, Accuracy and Stability of Numerical Algorithms, §4.2).
    allowed = np.ldexp(0.5, _last_place(exact)) + operations * 2.0**-24 * magnitude
    # Not "greater than": NaN is unexplained too.
    unexplained = np.count_nonzero(~(np.abs(from_bfloat16(merged) - exact) <= allowed))
    return TensorCheck(name, True, merged.size, identical, int(unexplained))


# bfloat16 is the upper half of a float32. NumPy lacks it, so it goes by its bits, in uint16.


def to_bfloat16(values: NDArray[np.float32]) -> BFloat16Bits:
    """Round finite float32 values to bfloat16, to nearest even."""
    bits = values.view(np.uint32)
    bits = bits + (0x7FFF + ((bits >> 16) & 1))
    return (bits >> 16).astype(np.uint16)


def from_bfloat16(bits: BFloat16Bits) -> NDArray[np.float32]:
    """Widen bfloat16 values, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(values: Float64) -> BFloat16Bits:
    """Round float64 values to bfloat16 once: by way of float32 would be twice."""
    last_place = _last_place(values)
    rounded = np.ldexp(np.rint(np.ldexp(values, -last_place)), last_place)
    bits: NDArray[np.uint32] = rounded.astype(np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16)


def _last_place(values: Float64) -> NDArray[np.int32]:
    """Return the exponent of 2 of bfloat16's last place at these values."""
    _, exponent = np.frexp(values)
    # 8 bits of significand. Below 2⁻¹²⁶ the step stays what it is there.
    return np.maximum(exponent, -125) - 8


# safetensors' own functions for NumPy refuse bfloat16. The format is the length of a JSON header,
# the header and the data.


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write float32 arrays, and uint16 arrays as bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": {"uint16": "BF16", "float32": "F32"}[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).data)


def read_tensor(path: Path, name: str) -> NDArray[Any]:
    """Read one float32 or bfloat16 tensor; the latter as uint16."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    start, end = entry["data_offsets"]
    dtype = np.dtype({"BF16": "<u2", "F32": "<f4"}[entry["dtype"]])
    values = np.fromfile(path, dtype, (end - start) // dtype.itemsize, offset=8 + length + start)
    return values.reshape(entry["shape"])


def read_bfloat16(directory: Path, name: str) -> BFloat16Bits:
    """Read one tensor of a sharded bfloat16 checkpoint."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    bits: BFloat16Bits = read_tensor(directory / index["weight_map"][name], name)
    if bits.dtype != np.uint16:
        message = f"{name} in {directory} is not bfloat16"
        raise ValueError(message)
    return bits


def _write_base(directory: Path, shape: ModelShape, random: np.random.Generator) -> None:
    directory.mkdir()
    shapes = shape.tensors()
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(_split(shapes, shape.shards), start=1):
        file = f"model-{number:05}-of-{shape.shards:05}.safetensors"
        tensors = {name: _base_tensor(name, shapes[name], random) for name in names}
        write_safetensors(directory / file, tensors)
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)
    _write_json(directory / "config.json", _model_config(shape))
    _write_json(directory / "generation_config.json", {"bos_token_id": 256, "eos_token_id": 257})
    _write_tokenizer(directory)


def _split(shapes: Mapping[str, tuple[int, ...]], count: int) -> list[list[str]]:
    """Deal tensors, in order, to `count` shards of about one size."""
    total = sum(map(math.prod, shapes.values()))
    shards: list[list[str]] = [[] for _ in range(count)]
    done = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        # A tensor belongs where its middle falls.
        shards[(2 * done + size) * count // (2 * total)].append(name)
        done += size
    return shards


def _base_tensor(name: str, shape: tuple[int, ...], random: np.random.Generator) -> BFloat16Bits:
    if name.endswith("norm.weight"):
        return to_bfloat16(np.ones(shape, np.float32))
    values = random.standard_normal(shape, np.float32)
    values *= np.float32(0.02)
    return to_bfloat16(values)


def _write_adapter(
    directory: Path, adapter: DemoAdapter, shape: ModelShape, random: np.random.Generator
) -> None:
    directory.mkdir()
    tensors: dict[str, NDArray[Any]] = {}
    for layer in range(shape.layers):
        for projection in adapter.projections:
            rows, columns = shape.linear(projection)
            prefix = f"base_model.model.{shape.module(layer, projection)}.lora_"
            factor_a = random.standard_normal((adapter.rank, columns), np.float32)
            factor_b = random.standard_normal((rows, adapter.rank), np.float32)
            tensors[f"{prefix}A.weight"] = factor_a / np.float32(math.sqrt(columns))
            tensors[f"{prefix}B.weight"] = factor_b * np.float32(0.02)
    write_safetensors(directory / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "lorafast-demo/base",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.rslora,
        "target_modules": list(adapter.projections),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    _write_json(directory / "adapter_config.json", config)


def _model_config(shape: ModelShape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "vocab_size": shape.vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "dtype": "bfloat16",
    }


def _write_tokenizer(directory: Path) -> None:
    """Write a tokenizer that makes a token of every byte, so that the model loads and runs."""
    # GPT-2's printable stand-ins for the 256 bytes (its `bytes_to_unicode`), by their code points.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = dict(zip(printable, map(chr, printable), strict=True))
    stand_ins |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    vocabulary = {stand_ins[byte]: byte for byte in range(256)}
    special = [
        {
            "id": number,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, content in ((256, "<s>"), (257, "</s>"))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level | {"use_regex": False},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    _write_json(directory / "tokenizer.json", tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 2048,
    }
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>"})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
