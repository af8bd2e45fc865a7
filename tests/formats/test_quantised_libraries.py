"""Quantised bases as the libraries themselves write and read them.

transformers' fp8 is always held against; bitsandbytes, whose wheel is large, and compressed-tensors
where they are installed (`pip install bitsandbytes compressed-tensors`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from support.files import Tensor, narrow, read_checkpoint, tensor
from support.handmade import adapter_tensors, make_adapter, make_base, write_checkpoint
from support.quantised import SCHEMES

WIDTH, INNER = 128, 256


def llama(path: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.05)
    model.save_pretrained(path)
    return path


def tuned(model: Any, path: Path) -> Any:
    """Adapts a model and saves the adapter."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj", "gate_proj"])
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.05)
    adapted.save_pretrained(path)
    return adapted


def test_transformers_reads_merged_fp8_as_it_was_meant(tmp_path: Path) -> None:
    """DeepSeek-V3's layout: on a machine without a GPU transformers dequantises it."""
    scheme = SCHEMES[0]
    plain = llama(tmp_path / "plain")
    tuned(transformers.LlamaForCausalLM.from_pretrained(plain), tmp_path / "adapter")
    base = tmp_path / "base"
    base.mkdir()
    shapes = {}
    tensors = {}
    for name, value in read_checkpoint(plain).items():
        if "_proj" in name:
            shapes[name] = value.shape
            tensors |= scheme.quantise(name, value.float64())
        else:
            tensors[name] = value
    write_checkpoint(base, tensors, shards=2)
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = dict(scheme.config) | {"activation_scheme": "dynamic"}
    (base / "config.json").write_text(json.dumps(config))
    for dtype in ("auto", "bfloat16"):
        merged = tmp_path / dtype
        lorafast.merge(base, tmp_path / "adapter", merged, dtype=dtype, verify=True)
        loaded = transformers.LlamaForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)
        state = loaded.state_dict()
        after = read_checkpoint(merged)
        for name, shape in shapes.items():
            value = (
                scheme.dequantise(after, name, shape) if dtype == "auto" else after[name].float64()
            )
            expected = narrow(value, "BF16")
            assert state[name].view(torch.int16).numpy().tobytes() == expected, name


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "fp4", "int8"])
@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_by_peft(kind: str, tmp_path: Path) -> None:
    """PEFT dequantises to bfloat16, adds, and quantises again: the same but for its roundings."""
    pytest.importorskip("bitsandbytes")
    settings: dict[str, Any] = (
        {"load_in_8bit": True}
        if kind == "int8"
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind[:3],
            "bnb_4bit_use_double_quant": kind.endswith("nested"),
            "bnb_4bit_compute_dtype": torch.float32,
        }
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        llama(tmp_path / "plain"),
        quantization_config=transformers.BitsAndBytesConfig(**settings),
        device_map="cpu",
    )
    base, adapter, ours = tmp_path / "base", tmp_path / "adapter", tmp_path / "ours"
    model.save_pretrained(base)
    merged = tuned(model, adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "peft")
    report = lorafast.merge(base, adapter, ours, verify=True)
    assert report.tensors_merged == 6
    before, expected, actual = (read_checkpoint(p) for p in (base, tmp_path / "peft", ours))
    assert actual.keys() == expected.keys()
    for name in actual:
        if name.endswith(("q_proj.weight", "down_proj.weight", "gate_proj.weight")):
            codes = [np.frombuffer(t[name].data, np.uint8) for t in (before, expected, actual)]
            assert np.mean(codes[1] == codes[2]) > 0.98, name
            assert np.mean(codes[0] == codes[2]) < 0.9, name
    loaded = transformers.AutoModelForCausalLM.from_pretrained(ours, device_map="cpu")
    original = transformers.AutoModelForCausalLM.from_pretrained(base, device_map="cpu")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        logits = [each(tokens).logits.float() for each in (original, merged, loaded)]
    assert (logits[1] - logits[2]).norm() < 0.1 * (logits[1] - logits[0]).norm()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_quantises_as_the_reference_does(kind: str) -> None:
    """The tests' own account of the scheme against the library's."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes import functional

    (scheme,) = (s for s in SCHEMES if s.name == kind + ("-nested" if kind == "fp4" else ""))
    weight = torch.randn(96, 64)
    nested = kind == "fp4"
    packed, state = functional.quantize_4bit(
        weight, quant_type=kind, compress_statistics=nested, blocksize=64
    )
    saved = {f"x.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    mine = scheme.quantise("x.weight", weight.double().numpy())
    np.testing.assert_allclose(saved["x.weight.quant_map"].numpy(), scheme.table, atol=1e-6)
    theirs = packed.numpy().ravel()
    assert np.mean(np.frombuffer(mine["x.weight"].data, np.uint8) == theirs) > 0.999
    theirs_as_files = {
        name: tensor(value.numpy(), NAMES[value.dtype]) for name, value in saved.items()
    }
    theirs_as_files["x.weight"] = tensor(packed.numpy(), "U8")
    read = scheme.dequantise(theirs_as_files, "x.weight", (96, 64))
    expected = functional.dequantize_4bit(packed, state).double().numpy()
    np.testing.assert_allclose(read, expected, rtol=2e-6, atol=1e-7)


NAMES = {torch.float32: "F32", torch.uint8: "U8"}


# The library's name of the format, its settings, what messages call it.
COMPRESSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        "NVFP4",
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
        "MXFP4",
    ),
    "int8 rows": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, "integers of 8 bits"),
    "int8 groups": (
        "pack-quantized",
        {"num_bits": 8, "strategy": "group", "group_size": 32},
        "integers of 8 bits",
    ),
    "int4 groups": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32},
        "integers of 4 bits",
    ),
    "fp8 rows": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        "fp8 (E4M3)",
    ),
}
FILE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
}


@pytest.mark.parametrize("case", COMPRESSED)
@pytest.mark.filterwarnings("ignore")
def test_compressed_tensors(case: str, tmp_path: Path) -> None:
    """What the library has compressed means what it decompresses; merged, it has the layout in
    which the library compresses the sum, and the same codes."""
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    name, settings, words = COMPRESSED[case]
    scale_dtypes = {"nvfp4": torch.float8_e4m3fn, "mxfp4": torch.uint8}
    args = QuantizationArgs(symmetric=True, scale_dtype=scale_dtypes.get(case), **settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(name)
    rows, columns = 48, 128

    def compressed(weight: torch.Tensor, unit: torch.Tensor | None = None) -> dict[str, Any]:
        groups = weight.reshape(rows, -1, args.group_size or columns)
        state = {"weight": weight}
        if case == "nvfp4":
            own = generate_gparam(weight.min(), weight.max())
            state["weight_global_scale"] = own if unit is None else unit
        state["weight_scale"], _ = calculate_qparams(
            groups.amin(dim=-1), groups.amax(dim=-1), args, state.get("weight_global_scale")
        )
        return dict(compressor.compress(state, scheme))

    def in_file(state: dict[str, Any]) -> dict[str, Tensor]:
        def bytes_of(value: torch.Tensor) -> bytes:
            return bytes(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

        return {
            f"x.{key}": Tensor(FILE_NAMES[value.dtype], tuple(value.shape), bytes_of(value))
            for key, value in state.items()
        }

    torch.manual_seed(1)
    state = compressed(torch.randn(rows, columns) * 0.05)
    group = {"targets": ["Linear"], "weights": {"num_bits": args.num_bits}}
    config = {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": name,
            "config_groups": {"group_0": group},
        }
    }
    base = make_base(tmp_path / "base", modules={}, others=in_file(state), config=config)
    assert words in str(lorafast.inspect(base).to_dict())
    expected = compressor.decompress(dict(state), scheme)["weight"].double().numpy()
    factors = adapter_tensors({"x": (rows, columns)})
    nothing = {
        key: tensor(np.zeros(value.shape)) if "lora_B" in key else value
        for key, value in factors.items()
    }
    none = make_adapter(tmp_path / "none", nothing, target_modules=["x"])
    lorafast.merge(base, none, tmp_path / "wide", dtype="float32")
    wide = read_checkpoint(tmp_path / "wide")["x.weight"].float64()
    # The library decompresses NVFP4 in bfloat16.
    np.testing.assert_allclose(wide, expected, rtol=2**-7 if case == "nvfp4" else 1e-6, atol=1e-9)
    lora = make_adapter(tmp_path / "adapter", factors, target_modules=["x"])
    lorafast.merge(base, lora, tmp_path / "sum", dtype="float32")
    total = torch.tensor(read_checkpoint(tmp_path / "sum")["x.weight"].float64()).float()
    lorafast.merge(base, lora, tmp_path / "merged", verify=True)
    merged = read_checkpoint(tmp_path / "merged")
    theirs = in_file(compressed(total, state.get("weight_global_scale")))
    assert theirs.keys() <= merged.keys()
    for key, value in theirs.items():
        assert (merged[key].dtype, merged[key].shape) == (value.dtype, value.shape)
    codes = next(key for key in ("x.weight_packed", "x.weight") if key in theirs)
    mine, other = (np.frombuffer(each[codes].data, np.uint8) for each in (merged, theirs))
    same = np.mean(mine == other)
    # The library rounds a power of two to the nearest in MXFP4, and lets weights saturate.
    assert same > (0.3 if case == "mxfp4" else 0.99)
