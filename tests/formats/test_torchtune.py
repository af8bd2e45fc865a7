"""torchtune's own names and its order of rows, against float64 references."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import Tensor, read_checkpoint, tensor, write_safetensors
from support.handmade import adapter_config, make_base

Array = np.ndarray[Any, np.dtype[np.float64]]

HEADS, KEYS, SIZE, HIDDEN = 4, 2, 6, 20
#: torchtune's name, Hugging Face's, (out, in).
MODULES = {
    "layers.0.attn.q_proj": ("model.layers.0.self_attn.q_proj", (HEADS * SIZE, HIDDEN)),
    "layers.0.attn.k_proj": ("model.layers.0.self_attn.k_proj", (KEYS * SIZE, HIDDEN)),
    "layers.0.attn.v_proj": ("model.layers.0.self_attn.v_proj", (KEYS * SIZE, HIDDEN)),
    "layers.0.attn.output_proj": ("model.layers.0.self_attn.o_proj", (HIDDEN, HEADS * SIZE)),
    "layers.0.mlp.w1": ("model.layers.0.mlp.gate_proj", (30, HIDDEN)),
    "layers.0.mlp.w2": ("model.layers.0.mlp.down_proj", (HIDDEN, 30)),
    "layers.0.mlp.w3": ("model.layers.0.mlp.up_proj", (30, HIDDEN)),
    "output": ("lm_head", (40, HIDDEN)),
}
CONFIG = {"model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": KEYS}


def factors(*, magnitudes: bool = False) -> dict[str, Tensor]:
    random = np.random.default_rng(3)
    tensors = {}
    for name, (_, (outputs, inputs)) in MODULES.items():
        tensors[f"{name}.lora_a.weight"] = tensor(0.1 * random.normal(size=(4, inputs)))
        tensors[f"{name}.lora_b.weight"] = tensor(0.1 * random.normal(size=(outputs, 4)))
        if magnitudes:
            tensors[f"{name}.magnitude"] = tensor(0.5 + np.abs(random.normal(size=outputs)))
    return tensors


def make(path: Path, tensors: Mapping[str, Tensor], **settings: Any) -> Path:
    path.mkdir(parents=True)
    write_safetensors(path / "adapter_model.safetensors", tensors)
    (path / "adapter_config.json").write_text(json.dumps(adapter_config(**settings)))
    return path


def base(path: Path, **config: Any) -> Path:
    shapes = dict(MODULES.values())
    return make_base(path, modules=shapes, config=CONFIG | config)


def straight(name: str, rows: Array, *, interleaved: bool = True) -> Array:
    """Rows in Hugging Face's order."""
    heads = {"q_proj": HEADS, "k_proj": KEYS}.get(name.rsplit(".", 1)[-1])
    if heads is None or not interleaved:
        return rows
    apart = rows.reshape(heads, SIZE // 2, 2, -1)
    return apart.swapaxes(1, 2).reshape(rows.shape)


def expected(
    before: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, interleaved: bool = True
) -> dict[str, Array]:
    found = {}
    for name, (path, _) in MODULES.items():
        a = tensors[f"{name}.lora_a.weight"].float64()
        b = straight(name, tensors[f"{name}.lora_b.weight"].float64(), interleaved=interleaved)
        weight = before[f"{path}.weight"].float64() + 2 * b @ a
        magnitude = tensors.get(f"{name}.magnitude")
        if magnitude is not None:
            length = straight(name, magnitude.float64()[:, None], interleaved=interleaved)
            weight = length * weight / np.linalg.norm(weight, axis=1, keepdims=True)
        found[f"{path}.weight"] = weight
    return found


def assert_merged(base: Path, output: Path, right: Mapping[str, Array]) -> None:
    before, after = read_checkpoint(base), read_checkpoint(output)
    for name, value in after.items():
        if name in right:
            assert np.allclose(value.float64(), right[name], rtol=1e-5, atol=1e-6), name
        else:
            assert value == before[name], name


@pytest.mark.parametrize("magnitudes", [False, True])
@pytest.mark.parametrize(("model", "interleaved"), [("llama", True), ("qwen2", False)])
def test_a_merge_is_that_of_the_rows_in_the_base_s_order(
    model: str, interleaved: bool, magnitudes: bool, tmp_path: Path
) -> None:
    model_path = base(tmp_path / "base", model_type=model)
    tensors = factors(magnitudes=magnitudes)
    adapter = make(tmp_path / "tune", tensors, use_dora=magnitudes)
    lorafast.merge(model_path, adapter, tmp_path / "out")
    before = read_checkpoint(model_path)
    right = expected(before, tensors, interleaved=interleaved)
    assert_merged(model_path, tmp_path / "out", right)
    assert lorafast.verify(model_path, adapter, tmp_path / "out").ok
    plan = lorafast.plan(model_path, adapter).to_dict()
    assert plan["adapters"][0]["format"] == "torchtune"
    uses = {each["use"] for each in plan["adapters"][0]["coverage"]["tensors"]}
    assert uses == {"used"}


def test_its_own_file_is_a_pickle(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = factors()
    model_path = base(tmp_path / "base")
    lorafast.merge(model_path, make(tmp_path / "tune", tensors), tmp_path / "a")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    state = {name: torch.tensor(value.float64()).float() for name, value in tensors.items()}
    torch.save(state, pickled / "adapter_model.pt")
    (pickled / "adapter_config.json").write_text(json.dumps(adapter_config()))
    for number, source in enumerate((pickled, pickled / "adapter_model.pt")):
        lorafast.merge(model_path, source, tmp_path / f"b{number}")
        assert read_checkpoint(tmp_path / f"b{number}") == read_checkpoint(tmp_path / "a")
    # The same under PEFT's names beside it is what counts.
    assert lorafast.scan(pickled).errors


def test_without_the_model_s_config_the_order_is_not_known(tmp_path: Path) -> None:
    tensors = factors()
    adapter = make(tmp_path / "tune", tensors)
    with pytest.raises(lorafast.UnsupportedAdapterError, match="give the base, or put the base's"):
        lorafast.compare([adapter, adapter])
    notes = " ".join(lorafast.inspect(adapter).to_dict()["adapter"]["notes"])
    assert "how many heads" in notes
    # Norms do not depend on the order.
    norms = lorafast.analyze(adapter).modules
    (adapter / "config.json").write_text(json.dumps(CONFIG))
    assert lorafast.compare([adapter, adapter]).to_dict()
    ordered = lorafast.analyze(adapter).modules
    assert [each.frobenius_norm for each in norms.values()] == pytest.approx(
        [each.frobenius_norm for each in ordered.values()]
    )
    assert not lorafast.scan(adapter).errors


def test_a_base_of_an_unknown_order_is_refused(tmp_path: Path) -> None:
    adapter = make(tmp_path / "tune", factors())
    for number, (config, says) in enumerate(
        [
            ({"model_type": "falcon"}, "falcon"),
            ({"num_attention_heads": None}, "num_attention_heads"),
            ({"num_attention_heads": 5}, "no 5 heads"),
        ]
    ):
        model_path = base(tmp_path / f"base{number}", **config)
        with pytest.raises(lorafast.AdapterError, match=says):
            lorafast.plan(model_path, adapter)


BROKEN: dict[str, tuple[dict[str, Tensor | None], dict[str, Any], str]] = {
    "no lora_a": ({"output.lora_a.weight": None}, {}, "but not its lora_a"),
    "no lora_b": ({"output.lora_b.weight": None}, {}, "but not its lora_b"),
    "a magnitude": ({"output2.magnitude": tensor(np.ones(4))}, {}, "but not its factors"),
    "its length": ({"output.magnitude": tensor(np.ones(4))}, {}, r"has shape \[4\]"),
    "ranks": ({"output.lora_b.weight": tensor(np.ones((40, 3)))}, {}, "no pair of factors"),
    "the config's": ({}, {"r": 8}, "rank 4 but the config gives this module rank 8"),
    "another tensor": ({"norm.scale": tensor(np.ones(20))}, {}, "no part of a LoRA of torchtune's"),
    "another module": (
        {
            "decoder.layers.0.attn.q_proj.lora_a.weight": tensor(np.ones((4, 20))),
            "decoder.layers.0.attn.q_proj.lora_b.weight": tensor(np.ones((24, 4))),
        },
        {},
        "a module of torchtune's",
    ),
    "integers": ({"output.lora_a.weight": tensor(np.ones((4, 20)), "I32")}, {}, "floating-point"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_said_in_one_sentence(name: str, tmp_path: Path) -> None:
    changes, settings, sentence = BROKEN[name]
    tensors: dict[str, Tensor] = dict(factors())
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    adapter = make(tmp_path / "tune", tensors, **settings)
    model_path = base(tmp_path / "base")
    with pytest.raises(lorafast.AdapterError, match=sentence) as raised:
        lorafast.merge(model_path, adapter, tmp_path / "out")
    assert str(adapter) in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_without_its_config_the_scale_is_not_known(tmp_path: Path) -> None:
    adapter = make(tmp_path / "tune", factors())
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(lorafast.AdapterError, match=r"holds no adapter_config\.json"):
        lorafast.plan(base(tmp_path / "base"), adapter)
    assert lorafast.inspect(adapter).to_dict()["adapter"]["alpha"] is None
