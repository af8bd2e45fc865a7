"""Keys and configs as earlier releases of PEFT wrote them mean what they mean today."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
import torch
from support.compare import assert_merged_like_float64, assert_rest_untouched
from support.files import Tensor, read_checkpoint, read_safetensors, tensor, write_safetensors
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base
from support.reference import PREFIX, merge_float64

WEIGHTS = "adapter_model.safetensors"
SCORE = f"{PREFIX}score.weight"
TOKENS = f"{PREFIX}model.embed_tokens"


def today(path: Path) -> Path:
    """An adapter with factors, an embedding's factors and a module that was saved whole."""
    random = np.random.default_rng(8)
    tensors = adapter_tensors() | {
        f"{TOKENS}.lora_embedding_A": tensor(random.normal(size=(4, 9))),
        f"{TOKENS}.lora_embedding_B": tensor(random.normal(size=(20, 4))),
        SCORE: tensor(random.normal(size=(3, 20))),
    }
    return make_adapter(path, tensors, modules_to_save=["score"], task_type="SEQ_CLS")


def renamed(adapter: Path, rename: Callable[[str], str], extra: dict[str, Tensor]) -> None:
    tensors = read_safetensors(adapter / WEIGHTS)
    write_safetensors(adapter / WEIGHTS, {rename(k): v for k, v in tensors.items()} | extra)


def with_adapter_names(adapter: Path) -> None:
    """The adapter's name left in the keys, as a state dict has them."""

    def rename(key: str) -> str:
        if "embedding" in key:
            return f"{key}.default"
        return key.replace(".weight", ".default.weight") if "lora_" in key else key

    renamed(adapter, rename, {})


def with_wrappers(adapter: Path) -> None:
    """Saved modules with the wrapper in their names, and the base's own beside them."""
    untrained = {f"{PREFIX}score.original_module.weight": tensor(np.ones((3, 20)))}
    renamed(adapter, lambda key: key.replace("score.", "score.modules_to_save."), untrained)


def with_wrappers_and_names(adapter: Path) -> None:
    renamed(adapter, lambda key: key.replace("score.", "score.modules_to_save.default."), {})


def as_pickle(adapter: Path) -> None:
    state = {
        key: torch.from_numpy(value.float64().astype(np.float32))
        for key, value in read_safetensors(adapter / WEIGHTS).items()
    }
    torch.save(state, adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()


def config_of(fields: dict[str, Any]) -> Callable[[Path], None]:
    def write(adapter: Path) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps(fields))

    return write


SHARED = {
    "base_model_name_or_path": "base",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "modules_to_save": ["score"],
    "peft_type": "LORA",
    "r": 4,
    "target_modules": ["q_proj", "up_proj", "embed_tokens"],
    "task_type": "SEQ_CLS",
}
LAYOUTS = {
    "names of adapters": with_adapter_names,
    "wrappers": with_wrappers,
    "wrappers and names": with_wrappers_and_names,
    "pickle": as_pickle,
    "config of 0.2": config_of(SHARED | {"enable_lora": None, "merge_weights": False}),
    "config of 0.3": config_of(SHARED | {"init_lora_weights": True}),
    "config of 0.4": config_of(
        SHARED
        | {
            "auto_mapping": None,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "revision": None,
        }
    ),
    "config of 0.6": config_of(
        SHARED
        | {
            "alpha_pattern": {},
            "auto_mapping": None,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "rank_pattern": {},
            "revision": None,
        }
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_result(tmp_path: Path, layout: str) -> None:
    random = np.random.default_rng(9)
    others = {
        "model.embed_tokens.weight": tensor(random.normal(size=(9, 20))),
        "score.weight": tensor(random.normal(size=(3, 20))),
    }
    base = make_base(tmp_path / "base", others=others)
    expected, old = today(tmp_path / "today"), today(tmp_path / "old")
    LAYOUTS[layout](old)
    lorafast.merge(base, expected, tmp_path / "expected")
    report = lorafast.merge(base, old, tmp_path / "out", verify=True)
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    assert after == read_checkpoint(tmp_path / "expected")
    terms = merge_float64(before, [expected])
    assert_merged_like_float64(after, terms)
    assert_rest_untouched(after, before, terms)
    assert terms.keys() == {f"{module}.weight" for module in MODULES} | others.keys()
    (coverage,) = report.coverage
    unused = [entry["name"] for entry in coverage["tensors"] if entry["use"] != "used"]
    assert unused == [f"{PREFIX}score.original_module.weight"] * (layout == "wrappers")
    assert not [entry for entry in coverage["fields"] if entry["use"] == "refused"]


def test_both_kinds_of_file(tmp_path: Path) -> None:
    """PEFT reads safetensors first, and so is a .bin beside it passed over."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter")
    lorafast.merge(base, adapter, tmp_path / "expected")
    torch.save({"stale": torch.ones(3)}, adapter / "adapter_model.bin")
    lorafast.merge(base, adapter, tmp_path / "out")
    assert read_checkpoint(tmp_path / "out") == read_checkpoint(tmp_path / "expected")
