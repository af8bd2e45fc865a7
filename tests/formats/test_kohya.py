"""kohya's plain LoRA: the same bytes as the PEFT adapter with equal tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import Tensor, tensor, write_safetensors
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base
from support.reference import PREFIX


def kohya(
    tensors: Mapping[str, Tensor], alphas: Mapping[str, float] | float | None, prefix: str
) -> dict[str, Tensor]:
    """PEFT's tensors under kohya's names, with an alpha beside each pair."""
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        module, part = name.removeprefix(PREFIX).rsplit(".lora_", 1)
        ending = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[part]
        flat = prefix + module.replace(".", "_")
        renamed[f"{flat}.{ending}"] = value
        alpha = alphas.get(module) if isinstance(alphas, Mapping) else alphas
        if alpha is not None:
            renamed[f"{flat}.alpha"] = tensor(np.array(alpha), value.dtype)
    return renamed


def merged(base: Path, adapter: Path, output: Path, **options: Any) -> dict[str, bytes]:
    lorafast.merge(base, adapter, output, **options)
    return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_te_", "lora_transformer_", "lycoris_", ""])
def test_a_kohya_file_merges_to_the_bytes_of_peft(dtype: str, prefix: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=dtype, shards=2)
    tensors = adapter_tensors(rank=4, dtype=dtype)
    peft = make_adapter(tmp_path / "peft", tensors, lora_alpha=6)
    file = write_safetensors(tmp_path / "style.safetensors", kohya(tensors, 6, prefix))
    expected = merged(base, peft, tmp_path / "a")
    assert merged(base, file, tmp_path / "b") == expected
    assert merged(base, [file, peft], tmp_path / "c") == merged(base, [peft, peft], tmp_path / "d")
    assert lorafast.verify(base, file, tmp_path / "b").ok


def test_each_module_has_its_own_alpha_and_without_one_the_scale_is_one(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tensors = adapter_tensors(rank=4)
    modules = list(MODULES)
    alphas = {modules[0]: 2.0, modules[1]: 8.0, modules[2]: 0.5}
    file = write_safetensors(tmp_path / "x.safetensors", kohya(tensors, alphas, "lora_unet_"))
    peft = make_adapter(tmp_path / "peft", tensors, lora_alpha=4, alpha_pattern=alphas)
    assert merged(base, file, tmp_path / "a") == merged(base, peft, tmp_path / "b")


def test_convolutions_and_names_that_leave_out_what_the_base_puts_before_them(
    tmp_path: Path,
) -> None:
    shape = (12, 8, 3, 3)
    random = np.random.default_rng(5)
    weight = tensor(random.normal(size=shape))
    name = "down_blocks.0.resnets.1.conv1"
    base = make_base(
        tmp_path / "base", others={f"model.unet.{name}.weight": weight}, config={"model_type": "x"}
    )
    factors = {
        f"{PREFIX}model.unet.{name}.lora_A.weight": tensor(random.normal(size=(4, 8, 3, 3))),
        f"{PREFIX}model.unet.{name}.lora_B.weight": tensor(random.normal(size=(12, 4, 1, 1))),
    }
    peft = make_adapter(tmp_path / "peft", factors, lora_alpha=4)
    short = {key.replace("model.unet.", ""): value for key, value in factors.items()}
    file = write_safetensors(tmp_path / "x.safetensors", kohya(short, 4, "lora_unet_"))
    assert merged(base, file, tmp_path / "a") == merged(base, peft, tmp_path / "b")


def test_it_is_listed_and_analyzed_like_any_adapter(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tensors = adapter_tensors(rank=4)
    file = write_safetensors(
        tmp_path / "style.safetensors",
        kohya(tensors, 6, "lora_unet_"),
        {"ss_base_model_version": "sdxl", "ss_network_dim": "4"},
    )
    listing = lorafast.inspect(file)
    assert listing["kind"] == "adapter"
    adapter = listing["adapter"]
    assert (adapter["r"], adapter["alpha"], adapter["base"]) == (4, 6.0, "sdxl")
    uses = {each["name"]: each["use"] for each in adapter["coverage"]["tensors"]}
    assert set(uses) == set(kohya(tensors, 6, "lora_unet_"))
    assert set(uses.values()) == {"used"}
    plan = lorafast.plan(base, file).to_dict()
    assert plan["adapters"][0]["format"] == "kohya"
    uses = {each["use"] for each in plan["adapters"][0]["coverage"]["tensors"]}
    assert uses == {"used"}
    analysis = lorafast.analyze(file, base=base)
    peft = lorafast.analyze(make_adapter(tmp_path / "peft", tensors, lora_alpha=6), base=base)
    for own, other in zip(analysis.modules.values(), peft.modules.values(), strict=True):
        assert own.frobenius_norm == other.frobenius_norm
        assert own.singular_values == other.singular_values
        assert own.base_norm == other.base_norm


def test_modules_that_the_base_does_not_have_are_all_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    renamed = kohya(adapter_tensors(rank=4), 4, "lora_unet_")
    renamed |= kohya(adapter_tensors({"mid.block": (6, 6)}, rank=4), 4, "lora_te_")
    file = write_safetensors(tmp_path / "x.safetensors", renamed)
    with pytest.raises(lorafast.PlanError, match="lora_te_mid_block") as raised:
        lorafast.plan(base, file)
    assert "lora_unet_model_layers_0_self_attn_q_proj" not in str(raised.value)


def test_two_modules_of_one_flattened_name_are_not_chosen_between(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", modules={"a.b_c": (6, 6), "a_b.c": (6, 6)})
    file = write_safetensors(
        tmp_path / "x.safetensors",
        kohya(adapter_tensors({"a.b_c": (6, 6)}, rank=2), 2, "lora_unet_"),
    )
    with pytest.raises(lorafast.PlanError, match="lora_unet_a_b_c"):
        lorafast.plan(base, file)


BROKEN: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no up": ({"{}.lora_up.weight": None}, "but not its lora_up"),
    "no down": ({"{}.lora_down.weight": None}, "but not its lora_down"),
    "alpha alone": (
        {"{}.lora_up.weight": None, "{}.lora_down.weight": None},
        "alpha but not its factors",
    ),
    "a mid": ({"{}.lora_mid.weight": tensor(np.ones((3, 4)))}, "no factors with a core"),
    "a scale": ({"{}.dora_scale": tensor(np.ones((23, 1)))}, "neither the outputs"),
    "ranks": ({"{}.lora_up.weight": tensor(np.ones((24, 3)))}, "no pair of factors"),
    "alpha of two": ({"{}.alpha": tensor(np.ones(2))}, "is one number"),
    "alpha of zero": ({"{}.alpha": tensor(np.array(0.0))}, "some programs read as the rank"),
    "alpha of infinity": ({"{}.alpha": tensor(np.array(np.inf))}, "finite number"),
    "integers": (
        {"{}.lora_up.weight": Tensor("I32", (24, 4), b"\0" * 384)},
        "floating-point type",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_said_in_one_sentence(name: str, tmp_path: Path) -> None:
    changes, sentence = BROKEN[name]
    tensors = kohya(adapter_tensors(rank=4), 4, "lora_unet_")
    for key, value in changes.items():
        own = key.format("lora_unet_model_layers_0_self_attn_q_proj")
        if value is None:
            del tensors[own]
        else:
            tensors[own] = value
    file = write_safetensors(tmp_path / "x.safetensors", tensors)
    base = make_base(tmp_path / "base")
    with pytest.raises(lorafast.AdapterError, match=sentence) as raised:
        lorafast.merge(base, file, tmp_path / "out")
    assert str(file) in str(raised.value)
    assert not (tmp_path / "out").exists()
