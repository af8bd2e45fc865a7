"""GGUF adapters as they are written, and their names as gguf-py has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast import _core
from numpy.typing import NDArray
from support import gguf_files
from support.files import Tensor, read_safetensors, snapshot, tensor, write_safetensors
from support.gguf_files import (
    HEADS,
    LLAMA,
    Factors,
    adapter_metadata,
    arrays,
    encode,
    factors,
    gguf_adapter,
    llama_base,
    merged,
    peft,
    regrouped,
)
from support.handmade import make_adapter, make_base
from support.reference import PREFIX


def written(adapter: Path, target: Path, base: Path, dtype: str | None = None) -> Path:
    _core.write_adapter(adapter, target, format="gguf", base=base, dtype=dtype)
    return target


def read_back(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """A file's fields and tensors as gguf-py reads them."""
    gguf = pytest.importorskip("gguf", reason="gguf is in the extra test")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {
        tensor.name: np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type)).reshape(
            [int(extent) for extent in reversed(tensor.shape)]
        )
        for tensor in reader.tensors
    }


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_peft_to_gguf_and_back_is_bit_equal(dtype: str, tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    adapter = peft(tmp_path / "peft", factors(LLAMA), dtype)
    file = written(adapter, tmp_path / "x.gguf", base)
    assert merged(base, file, tmp_path / "a") == merged(base, adapter, tmp_path / "b")
    _core.write_adapter(file, tmp_path / "back", format="peft", base=base)
    own, back = (
        read_safetensors(path / "adapter_model.safetensors")
        for path in (adapter, tmp_path / "back")
    )
    assert own == {name: back[name] for name in own}
    assert len(own) == len(back)
    assert lorafast.similarity([file, adapter]).matrix[0, 1] == pytest.approx(1, abs=1e-6)
    again = written(file, tmp_path / "y.gguf", base)
    assert again.read_bytes() == file.read_bytes()


def test_gguf_py_reads_what_is_written(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    made = factors(LLAMA)
    file = written(
        peft(tmp_path / "peft", made, base_model_name_or_path="org/base"), tmp_path / "x.gguf", base
    )
    fields, tensors = read_back(file)
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 8.0
    assert fields["general.base_model.0.name"] == "org/base"
    assert fields["general.base_model.0.repo_url"] == "https://huggingface.co/org/base"
    assert lorafast.inspect(file).to_dict()["adapter"]["base"] == "org/base"
    expected = arrays(made)
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value.astype(np.float32))


def scaled(folder: Path, made: Factors, how: str) -> tuple[Path, bool]:
    """An adapter whose scales are not all α/r, and whether bringing them to one alpha is exact."""
    names = list(made)
    keys = [f"^{name}$".replace(".", r"\.") for name in names]
    match how:
        case "rslora":
            return peft(folder, made, use_rslora=True, r=4, lora_alpha=3), True
        case "patterns of powers of two":
            return peft(folder, made, alpha_pattern={keys[1]: 2, keys[2]: 32, keys[3]: 8}), True
        case "patterns":
            return peft(folder, made, alpha_pattern={keys[1]: 3, keys[2]: 0.7}), False
        case "an alpha of zero":
            return peft(folder, made, alpha_pattern={keys[1]: 0}), True
        case _:
            return peft(folder, made, r=3, lora_alpha=2, use_rslora=True), False


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(
    "how",
    ["rslora", "patterns of powers of two", "patterns", "an alpha of zero", "rslora of rank 3"],
)
def test_scales_are_brought_to_one_alpha(how: str, dtype: str, tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    made = factors(LLAMA, rank=3 if "rank 3" in how else 4)
    adapter, is_exact = scaled(tmp_path / "peft", made, how)
    tensors = read_safetensors(adapter / "adapter_model.safetensors")
    if dtype != "F32":
        tensors = {name: tensor(value.float64(), dtype) for name, value in tensors.items()}
        write_safetensors(adapter / "adapter_model.safetensors", tensors, {"format": "pt"})
    file = written(adapter, tmp_path / "x.gguf", base)
    a, b = merged(base, file, tmp_path / "a"), merged(base, adapter, tmp_path / "b")
    if is_exact:
        assert a == b
    one, other = (read_safetensors(tmp_path / side / "model.safetensors") for side in "ab")
    for name, value in one.items():
        np.testing.assert_allclose(value.float64(), other[name].float64(), rtol=3e-7, atol=1e-7)
    fields, _ = read_back(file)
    assert fields["adapter.lora.alpha"] != 0


def test_what_is_written_has_the_type_that_was_asked_for(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    made = factors(LLAMA)
    file = written(peft(tmp_path / "peft", made), tmp_path / "x.gguf", base, "F16")
    expected = gguf_adapter(tmp_path / "y.gguf", made, "F16")
    assert merged(base, file, tmp_path / "a") == merged(base, expected, tmp_path / "b")
    large = {name: (a, 1e6 * b) for name, (a, b) in made.items()}
    before = snapshot(tmp_path)
    large_adapter = peft(tmp_path / "large", large)
    with pytest.raises(ValueError, match="too large for F16"):
        written(large_adapter, tmp_path / "z.gguf", base, "F16")
    assert snapshot(tmp_path).keys() - before.keys() == snapshot(tmp_path).keys() - before.keys()
    assert not (tmp_path / "z.gguf").exists()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("architecture", ["bloom", "qwen35"])
def test_every_order_of_rows_is_written_as_it_is_read(architecture: str, tmp_path: Path) -> None:
    if architecture == "bloom":
        modules = {"transformer.h.0.self_attention.query_key_value": (72, 20)}
        config: dict[str, Any] = {"model_type": "bloom", "n_head": 6}
    else:
        at = "model.layers.0.linear_attn."
        modules = {f"{at}in_proj_qkv": (44, 20), f"{at}out_proj": (20, 24)}
        config = {
            "model_type": "qwen3_5_text",
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 5,
        }
    base = make_base(tmp_path / "base", modules=modules, config=config)
    made = factors(modules)
    file = written(peft(tmp_path / "peft", made), tmp_path / "x.gguf", base)
    assert merged(base, file, tmp_path / "a") == merged(base, tmp_path / "peft", tmp_path / "b")
    _, tensors = read_back(file)
    if architecture == "bloom":
        ((_, b),) = made.values()
        expected = regrouped(b, 6, 6).astype(np.float32)
        np.testing.assert_array_equal(tensors["blk.0.attn_qkv.weight.lora_b"], expected)


def test_what_a_gguf_adapter_cannot_say_is_refused_by_name(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    made = factors({"model.layers.1.mlp.up_proj": (50, 20)})
    module = f"{PREFIX}model.layers.1.mlp.up_proj"

    def refuses_to_write(name: str, says: str, tensors: dict[str, Tensor], **settings: Any) -> None:
        plain = {
            f"{module}.lora_{part}.weight": tensor(value)
            for part, value in zip("AB", made["model.layers.1.mlp.up_proj"], strict=True)
        }
        adapter = make_adapter(
            tmp_path / name, plain | tensors, target_modules=["up_proj"], **settings
        )
        with pytest.raises(lorafast.UnsupportedAdapterError, match=says):
            written(adapter, tmp_path / "x.gguf", base)
        assert not (tmp_path / "x.gguf").exists()

    magnitude = {f"{module}.lora_magnitude_vector": tensor(np.ones(50))}
    refuses_to_write(
        "dora", "rescales model.layers.1.mlp.up_proj by DoRA", magnitude, use_dora=True
    )
    bias = {f"{module}.lora_B.bias": tensor(np.ones(50))}
    refuses_to_write("bias", "adds a bias to", bias, lora_bias=True)
    head = {f"{PREFIX}lm_head.weight": tensor(np.ones((30, 20)))}
    refuses_to_write("saved", "brings lm_head.* whole", head, modules_to_save=["lm_head"])
    odd = {f"{PREFIX}model.odd.lora_{part}.weight": tensor(np.ones((4, 4))) for part in "AB"}
    refuses_to_write("odd", "changes model.odd, which has no tensor", odd)
    adapter = peft(tmp_path / "plain", made)
    with pytest.raises(ValueError, match="takes the base"):
        _core.write_adapter(adapter, tmp_path / "x.gguf", format="gguf")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "odd"}))
    with pytest.raises(lorafast.LorafastError, match="model_type odd"):
        written(adapter, tmp_path / "x.gguf", base)


def test_the_head_of_a_tied_model_has_no_tensor(tmp_path: Path) -> None:
    modules = {name: shape for name, shape in LLAMA.items() if name != "lm_head"}
    config = HEADS | {"tie_word_embeddings": True}
    base = make_base(tmp_path / "base", modules=modules, config=config)
    adapter = peft(tmp_path / "peft", factors({"lm_head": (30, 20)}))
    with pytest.raises(lorafast.UnsupportedAdapterError, match="shares with its embeddings"):
        written(adapter, tmp_path / "x.gguf", base)


def test_names_are_those_of_gguf_py(tmp_path: Path) -> None:
    """Each tensor of each architecture that is read belongs to the module that gguf-py gives it."""
    gguf = pytest.importorskip("gguf", reason="gguf is in the extra test")
    file = tmp_path / "x.gguf"
    known: dict[str, int] = {}
    unknown: list[str] = []
    for kind, architecture in gguf.MODEL_ARCH_NAMES.items():
        names = gguf.get_tensor_name_map(kind, 2)
        for part in gguf.MODEL_TENSORS[kind]:
            name = gguf.TENSOR_NAMES[part].format(bid=1)
            shape = (2, 4, 4) if name.endswith("_exps") else (4, 4)
            tensors = {f"{name}.weight.lora_{side}": tensor(np.ones(shape)) for side in "ab"}
            gguf_files.write(file, encode(tensors, adapter_metadata(architecture)))
            try:
                listing = lorafast.inspect(file).to_dict()
            except lorafast.UnsupportedAdapterError as error:
                if "is for llama.cpp's architecture" in str(error):
                    break
                unknown.append(str(error))
                continue
            path = listing["adapter"]["modules"][0]["name"].replace(".experts.0.", ".experts.")
            # The converter of ChatGLM leaves out what stands before the names.
            own = path.removeprefix("transformer.") if architecture == "chatglm" else path
            assert names.get_name(own) == name, (architecture, name, path)
            known[architecture] = known.get(architecture, 0) + 1
    assert all("no module that is known" in said for said in unknown)
    assert len(known) > 55
    assert all(count >= 6 for count in known.values()), known


def test_flattened_names_become_llama_cpp_s(tmp_path: Path) -> None:
    """From kohya's file, of which the base tells the names."""
    base = llama_base(tmp_path / "base")
    made = factors({name: shape for name, shape in LLAMA.items() if "embed" not in name})
    stored = {}
    for module, (a, b) in made.items():
        flat = f"lora_te_{module.replace('.', '_')}"
        stored |= {f"{flat}.lora_down.weight": tensor(a), f"{flat}.lora_up.weight": tensor(b)}
        stored[f"{flat}.alpha"] = tensor(np.array(8.0))
    kohya = write_safetensors(tmp_path / "x.safetensors", stored)
    file = written(kohya, tmp_path / "x.gguf", base)
    expected = gguf_adapter(tmp_path / "y.gguf", made)
    assert merged(base, file, tmp_path / "a") == merged(base, expected, tmp_path / "b")
    _, tensors = read_back(file)
    assert tensors.keys() == arrays(made).keys()
