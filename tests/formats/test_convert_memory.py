"""What a conversion holds: a piece of the factors that it makes, however large the adapter is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(sys.platform != "linux", reason="a peak of the memory is asked of Linux"),
]

WIDTH, RANK = 6144, 16
SIZE = 160 << 20
#: What a conversion may take beyond what was there before it, of which each thread has buffers.
BOUND = 32 + 8 * (os.cpu_count() or 1) << 20

#: Converts a small adapter and a large one, and prints by how many bytes the peak grew in all.
PROGRAM = """
import json, sys
from pathlib import Path
import lorafast

base, adapters, target, dtype = sys.argv[1], sys.argv[2:4], sys.argv[4], sys.argv[5]

# Of this process alone: what getrusage tells begins with its parent's.
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

lorafast.inspect(adapters[0])
before = peak()
grown = []
for adapter in adapters:
    endings = {"peft": "", "mlx": "", "gguf": ".gguf"}
    output = f"{adapter}-{target}-{dtype}" + endings.get(target, ".safetensors")
    report = lorafast.convert(adapter, output, to=target, base=base, dtype=dtype)
    grown.append(peak() - before)
print(json.dumps([grown[-1], grown[0], report.max_error]))
"""


def grown_by(base: Path, small: Path, large: Path, to: str, dtype: str = "auto") -> tuple[int, Any]:
    paths = [str(path) for path in (base, small, large)]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *paths, to, dtype],
        capture_output=True,
        text=True,
        check=False,
        # Arenas of threads that come and go are no memory of a conversion.
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
    )
    assert result.returncode == 0, result.stderr
    grown, first, error = json.loads(result.stdout)
    print(f"{to} {dtype}: {first >> 20} MiB, then {grown >> 20} MiB")
    return grown, error


def holes(path: Path, shapes: dict[str, tuple[int, int]]) -> Path:
    """A file of tensors in BF16 that are holes."""
    header: dict[str, Any] = {}
    end = 0
    for key, (rows, columns) in shapes.items():
        start, end = end, end + 2 * rows * columns
        header[key] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def flux_base(path: Path, blocks: int) -> Path:
    """A base in Flux's original names."""
    keys = ("img_in.weight", "txt_in.weight", "guidance_in.in_layer.weight")
    shapes = dict.fromkeys(keys, (WIDTH, 64))
    for block in range(blocks):
        shapes[f"double_blocks.{block}.img_attn.qkv.weight"] = (3 * WIDTH, WIDTH)
        shapes[f"double_blocks.{block}.img_attn.proj.weight"] = (WIDTH, WIDTH)
    return holes(path, shapes)


def split_adapter(path: Path, blocks: int, alpha: float) -> Path:
    """q, k and v apart, each with factors and an alpha of its own, in diffusers' names."""
    random = np.random.default_rng(0)
    down = random.normal(size=(RANK, WIDTH)).astype(np.float16)
    tensors: dict[str, Any] = {}
    for block in range(blocks):
        for number, part in enumerate(("to_q", "to_k", "to_v", "to_out.0")):
            key = f"transformer.transformer_blocks.{block}.attn.{part}"
            # Rows in another order, so that no two share their first factor.
            tensors[f"{key}.lora_A.weight"] = np.roll(down, number, axis=0)
            up = random.normal(size=(WIDTH, RANK)).astype(np.float16)
            tensors[f"{key}.lora_B.weight"] = up
            tensors[f"{key}.alpha"] = np.array(alpha * (number + 1), np.float32)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("split")
    blocks = SIZE // (4 * 2 * 2 * RANK * WIDTH)
    base = flux_base(root / "flux.safetensors", blocks)
    small = split_adapter(root / "small.safetensors", 1, 24.0)
    return base, small, split_adapter(root / "large.safetensors", blocks, 24.0)


@pytest.mark.parametrize(
    ("to", "dtype"),
    [("kohya", "auto"), ("diffusers", "auto"), ("comfyui", "bfloat16"), ("peft", "float32")],
)
def test_joins_folded_scales_and_casts_are_made_in_pieces(
    to: str, dtype: str, split: tuple[Path, Path, Path]
) -> None:
    base, small, large = split
    assert large.stat().st_size > SIZE * 0.9
    grown, error = grown_by(base, small, large, to, dtype)
    assert error is not None
    assert error < 1e-2
    assert grown < BOUND, f"{grown >> 20} MiB"


def language_model(root: Path, layers: int) -> tuple[Path, Path, Path]:
    """A small and a large adapter of an MLX-able model, each module with another alpha."""
    base = root / "base"
    base.mkdir()
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(layers)]
    shapes = {f"{name}.weight": (WIDTH, WIDTH) for name in names}
    holes(base / "model.safetensors", shapes)
    config = {"model_type": "llama", "num_attention_heads": 12, "num_key_value_heads": 12}
    (base / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    adapters = []
    for name, count in (("small", 1), ("large", layers)):
        folder = root / name
        folder.mkdir()
        tensors = {}
        for key in names[:count]:
            down = random.normal(size=(RANK, WIDTH)).astype(np.float16)
            up = random.normal(size=(WIDTH, RANK)).astype(np.float16)
            tensors[f"base_model.model.{key}.lora_A.weight"] = down
            tensors[f"base_model.model.{key}.lora_B.weight"] = up
        save_file(tensors, folder / "adapter_model.safetensors")
        alphas = {key: 10.0 + number for number, key in enumerate(names[:count])}
        settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 7, "target_modules": ["q_proj"]}
        settings["alpha_pattern"] = alphas
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        adapters.append(folder)
    return base, adapters[0], adapters[1]


@pytest.mark.parametrize("to", ["mlx", "gguf"])
def test_transposes_and_reordered_rows_are_made_in_pieces(to: str, tmp_path: Path) -> None:
    layers = SIZE // (2 * 2 * RANK * WIDTH)
    grown, error = grown_by(*language_model(tmp_path, layers), to)
    assert error is not None
    assert error < 1e-6
    assert grown < BOUND, f"{grown >> 20} MiB"
