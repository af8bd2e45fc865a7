"""Merged views as others load them: transformers, modules of torch, loaders of serving engines.

The examples of docs/views.md are run on a model of transformers; vLLM and SGLang, which need a GPU,
stand in as what their loaders call.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lorafast
import pytest
import torch
from safetensors import safe_open
from support.models import Models, load, outputs
from support.views import raw

TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "views.md"
EXAMPLES = [
    match[1]
    for match in re.finditer(
        r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
]


def example(word: str) -> str:
    """The example of the document that has this word."""
    (found,) = [text for text in EXAMPLES if word in text]
    return found


@pytest.fixture
def world(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the examples name, and with the finished merges."""
    base = models.llama("BF16")
    (tmp_path / "llama").symlink_to(base)
    for seed, (name, targets) in enumerate(
        {"style": TARGETS, "facts": ["q_proj", "o_proj"]}.items()
    ):
        adapter = models.adapter(
            f"view-{name}", base, steps=0, seed=seed, r=4, target_modules=targets
        )
        (tmp_path / name).symlink_to(adapter)
        lorafast.merge(base, adapter, tmp_path / f"llama-{name}", report=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {"lorafast": lorafast}
    exec(compile(text, "<example>", "exec"), names)
    return names


def from_files(folder: Path) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a model's files as loaders iterate over them."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found += [(name, file.get_tensor(name)) for name in file.offset_keys()]
    return found


def test_transformers_loads_a_view_and_computes_the_same(world: Path) -> None:
    loaded = run(example("state_dict={name: merged.get_slice"))["model"].eval()
    expected = load(world / "llama-style")
    assert next(loaded.parameters()).dtype == torch.bfloat16
    assert torch.equal(outputs(loaded), outputs(expected))
    assert not torch.equal(outputs(loaded), outputs(load(world / "llama")))


def test_transformers_loads_the_tensors_themselves(world: Path) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    with lorafast.open_merged("llama", "style", dtype="float32") as merged:
        config = merged.config()
        assert config is not None
        loaded = LlamaForCausalLM.from_pretrained(
            None,
            config=AutoConfig.for_model(**config),
            state_dict=dict(merged.items()),
            dtype="auto",
        ).eval()
        assert next(loaded.parameters()).dtype == torch.float32
        lorafast.merge("llama", "style", world / "wide", dtype="float32", report=False)
        assert torch.equal(outputs(loaded), outputs(load(world / "wide")))


def test_a_module_takes_the_tensors_without_a_copy_and_then_those_of_a_swap(world: Path) -> None:
    first, second = example("assign=True").split("    # Later:")
    loaded = run(first + "    tensors = dict(merged.items())\n")
    state = loaded["model"].state_dict()
    for name, expected in from_files(world / "llama-style"):
        assert raw(state[name]) == raw(expected), name
    state = run(f"{first}    # Later:{second}")["model"].state_dict()
    for name, expected in from_files(world / "llama-facts"):
        assert raw(state[name]) == raw(expected), name


class Served(torch.nn.Module):
    """A Llama's layer as serving engines have it: fused, and cut for one rank of two."""

    #: Parts of a file's names, the parameter of which each is a part, and which.
    FUSED = (
        ("q_proj", "qkv_proj", 0),
        ("k_proj", "qkv_proj", 1),
        ("v_proj", "qkv_proj", 2),
        ("gate_proj", "gate_up_proj", 0),
        ("up_proj", "gate_up_proj", 1),
    )

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.loaded: dict[tuple[str, int], torch.Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As vLLM's models: goes over an iterator once, and copies its share of each tensor."""
        seen = set()
        for name, tensor in weights:
            parameter, place = name, 0
            for part, fused, number in self.FUSED:
                if part in name:
                    parameter, place = name.replace(part, fused), number
            share = tensor.shape[0] // 2
            own = tensor.narrow(0, self.rank * share, share)
            target = self.loaded.setdefault((parameter, place), torch.empty_like(own))
            target.copy_(own)
            seen.add(parameter)
        return seen


def same(one: Served, other: Served) -> bool:
    return one.loaded.keys() == other.loaded.keys() and all(
        raw(one.loaded[key]) == raw(other.loaded[key]) for key in one.loaded
    )


def test_a_loader_of_weights_takes_the_items_and_a_swap(world: Path) -> None:
    for rank in (0, 1):
        served, expected = Served(rank), Served(rank)
        with lorafast.open_merged("llama", "style") as merged:
            names = served.load_weights(merged.items())
            assert names == expected.load_weights(from_files(world / "llama-style"))
            assert same(served, expected)
            served.load_weights(merged.swap("facts"))
            expected.load_weights(from_files(world / "llama-facts"))
            assert same(served, expected)
            served.load_weights(merged.swap([]))
            expected.load_weights(from_files(world / "llama"))
            assert same(served, expected)


def test_the_example_of_vllm(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = {}

    class BaseModelLoader:
        def __init__(self, load_config: Any) -> None:
            self.load_config = load_config

    def register_model_loader(name: str) -> Any:
        return lambda loader: registered.setdefault(name, loader)

    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.model_loader"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    loaders: Any = sys.modules["vllm.model_executor.model_loader"]
    loaders.register_model_loader = register_model_loader
    base: Any = ModuleType("vllm.model_executor.model_loader.base_loader")
    base.BaseModelLoader = BaseModelLoader
    monkeypatch.setitem(sys.modules, base.__name__, base)
    run(example("register_model_loader"))
    config = SimpleNamespace(model_loader_extra_config={"adapters": ["style"]})
    loader = registered["lorafast"](config)
    model_config = SimpleNamespace(model="llama")
    loader.download_model(model_config)
    served, expected = Served(1), Served(1)
    loader.load_weights(served, model_config)
    expected.load_weights(from_files(world / "llama-style"))
    assert same(served, expected)


def test_the_example_of_sglang(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights: dict[str, torch.Tensor] = {}

    class Engine:
        def __init__(self, model_path: str) -> None:
            weights.update(from_files(Path(model_path)))

        def update_weights_from_tensor(self, named: list[tuple[str, torch.Tensor]]) -> None:
            assert {name for name, _ in named} <= weights.keys()
            weights.update(named)

    stub: Any = ModuleType("sglang")
    stub.Engine = Engine
    monkeypatch.setitem(sys.modules, "sglang", stub)
    run(example("sglang"))
    expected = dict(from_files(world / "llama-facts"))
    assert {name: raw(found) for name, found in weights.items()} == {
        name: raw(found) for name, found in expected.items()
    }
