"""Converting the factors of all experts between the programs that have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file
from support.files import read_checkpoint, tensor
from support.handmade import make_adapter, make_base
from support.reference import PREFIX

Array = npt.NDArray[Any]

EXPERTS, RANK, HIDDEN, WIDTH = 3, 4, 20, 12
AT = "model.layers.0.mlp.experts"
MATRICES = {
    "gate_proj": (WIDTH, HIDDEN),
    "up_proj": (WIDTH, HIDDEN),
    "down_proj": (HIDDEN, WIDTH),
}


def make_model(path: Path, kind: str) -> Path:
    random = np.random.default_rng(12)
    weights = {name: random.normal(size=(EXPERTS, *shape)) for name, shape in MATRICES.items()}
    if kind == "one by one":
        others = {
            f"{AT}.{index}.{name}.weight": tensor(weight[index])
            for name, weight in weights.items()
            for index in range(EXPERTS)
        }
    elif kind == "fused":
        gate_up = np.concatenate([weights["gate_proj"], weights["up_proj"]], axis=1)
        others = {
            f"{AT}.gate_up_proj": tensor(gate_up),
            f"{AT}.down_proj": tensor(weights["down_proj"]),
        }
    else:
        both = np.stack([weights["gate_proj"], weights["up_proj"]], axis=2)
        both = both.reshape(EXPERTS, 2 * WIDTH, HIDDEN)
        others = {
            f"{AT}.gate_up_proj": tensor(both.transpose(0, 2, 1)),
            f"{AT}.down_proj": tensor(weights["down_proj"].transpose(0, 2, 1)),
        }
    model = "gpt_oss" if kind == "in turn" else "qwen3_moe"
    return make_base(path, modules={}, others=others, config={"model_type": model})


def make(path: Path, names: dict[str, str], *, shared: bool = False) -> Path:
    """Expert-first factors of the matrices, under these names."""
    random = np.random.default_rng(4)
    tensors = {}
    for name, own in names.items():
        outputs, inputs = MATRICES[name]
        is_shared = shared and name != "down_proj"
        a = random.normal(size=(1 if is_shared else EXPERTS, RANK, inputs))
        b = random.normal(size=(EXPERTS, outputs, RANK))
        tensors[f"{PREFIX}{AT}.{own}.lora_A.weight"] = tensor(a)
        tensors[f"{PREFIX}{AT}.{own}.lora_B.weight"] = tensor(b)
    return make_adapter(path, tensors, r=RANK, lora_alpha=8, target_modules="all-linear")


OF_TINKER = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def assert_merged_alike(base: Path, first: Path, second: Path, place: Path) -> None:
    lorafast.merge(base, first, place / "a")
    lorafast.merge(base, second, place / "b")
    before = read_checkpoint(base)
    one, other = read_checkpoint(place / "a"), read_checkpoint(place / "b")
    for name, value in one.items():
        np.testing.assert_allclose(other[name].float64(), value.float64(), atol=1e-5, err_msg=name)
        if "experts" in name:
            assert not np.allclose(value.float64(), before[name].float64())


@pytest.mark.parametrize("kind", ["one by one", "fused", "in turn"])
@pytest.mark.parametrize("to", ["peft", "mlx", "tinker"])
def test_from_tinker_and_back(to: Any, kind: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", kind)
    adapter = make(tmp_path / "tinker", OF_TINKER, shared=True)
    report = lorafast.convert(adapter, tmp_path / "there", to=to, base=base)
    assert (report.source_format, report.target_format) == ("tinker", to)
    assert report.max_error is not None
    assert report.max_error < 1e-6
    assert_merged_alike(base, adapter, tmp_path / "there", tmp_path)
    back = lorafast.convert(tmp_path / "there", tmp_path / "back", to="tinker", base=base)
    assert back.max_error is not None
    assert back.max_error < 1e-6
    (tmp_path / "2").mkdir()
    assert_merged_alike(base, adapter, tmp_path / "back", tmp_path / "2")
    if to != "peft":
        own, again = (
            load_file(each / "adapter_model.safetensors") for each in (adapter, tmp_path / "back")
        )
        assert own.keys() == again.keys()
        for name, value in own.items():
            np.testing.assert_array_equal(again[name], value)


def test_peft_has_them_as_parameters(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "fused")
    adapter = make(tmp_path / "tinker", OF_TINKER)
    lorafast.convert(adapter, tmp_path / "peft", to="peft", base=base)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["target_parameters"] == [f"{AT}.gate_up_proj", f"{AT}.down_proj"]
    shapes = {
        name.removeprefix(f"{PREFIX}{AT}."): value.shape
        for name, value in load_file(tmp_path / "peft/adapter_model.safetensors").items()
    }
    assert shapes == {
        "base_layer.lora_A.weight": (EXPERTS * 2 * RANK, HIDDEN),
        "base_layer.lora_B.weight": (2 * WIDTH, EXPERTS * 2 * RANK),
        "lora_A.weight": (EXPERTS * RANK, WIDTH),
        "lora_B.weight": (HIDDEN, EXPERTS * RANK),
    }


def test_which_rows_are_which_needs_the_base(tmp_path: Path) -> None:
    adapter = make(tmp_path / "tinker", OF_TINKER)
    with pytest.raises(lorafast.UnsupportedAdapterError, match="told by the base; give it"):
        lorafast.convert(adapter, tmp_path / "peft", to="peft")
    assert not (tmp_path / "peft").exists()
    report = lorafast.convert(adapter, tmp_path / "mlx", to="mlx")
    assert report.max_error == 0.0
    names = {name.split(".lora")[0] for name in load_file(tmp_path / "mlx/adapters.safetensors")}
    assert names == {f"model.layers.0.mlp.switch_mlp.{name}" for name in MATRICES}
    base = make_model(tmp_path / "base", "fused")
    lorafast.convert(adapter, tmp_path / "peft", to="peft", base=base)
    with pytest.raises(lorafast.UnsupportedAdapterError, match="gate and upward matrix as one"):
        lorafast.convert(tmp_path / "peft", tmp_path / "again", to="mlx")


@pytest.mark.parametrize("to", ["kohya", "torchtune", "gguf"])
def test_others_have_no_place_for_them(to: Any, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "fused")
    adapter = make(tmp_path / "tinker", OF_TINKER)
    with pytest.raises(lorafast.UnsupportedAdapterError, match="experts"):
        lorafast.convert(adapter, tmp_path / "out.safetensors", to=to, base=base)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_peft_itself_merges_what_is_written(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = transformers.Qwen3MoeConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        moe_intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=10,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        vocab_size=32,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config)
    if not hasattr(model.model.layers[0].mlp.experts, "gate_up_proj"):
        pytest.skip("this release has its experts one by one")
    base = tmp_path / "base"
    model.save_pretrained(base)
    adapter = make(tmp_path / "tinker", OF_TINKER)
    lorafast.convert(adapter, tmp_path / "peft", to="peft", base=base)
    lorafast.merge(base, adapter, tmp_path / "out")
    wrapped = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft"
    )
    expected = wrapped.merge_and_unload().state_dict()
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value.numpy(), atol=2e-5, err_msg=name)
    before = model.state_dict()
    assert not np.allclose(
        found[f"{AT}.gate_up_proj"].numpy(), before[f"{AT}.gate_up_proj"].numpy()
    )
