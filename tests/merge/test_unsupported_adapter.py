"""Features that cannot be merged, and a config and tensors that disagree, are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import Tensor, read_checkpoint, tensor
from support.handmade import adapter_tensors, make_adapter, make_base
from support.reference import PREFIX
from support.refusal import refuses

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def embedding(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = tensor(np.ones((4, 9)))
    tensors["base_model.model.model.embed_tokens.lora_embedding_B"] = tensor(np.ones((20, 4)))


def convolution(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.conv.lora_A.weight"] = tensor(np.ones((4, 3, 3, 3)))
    tensors["base_model.model.conv.lora_B.weight"] = tensor(np.ones((8, 4, 1, 1)))


def magnitude(tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}{Q_PROJ}.lora_magnitude_vector"] = tensor(np.ones(24))


def bias_of_b(tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}{Q_PROJ}.lora_B.bias"] = tensor(np.ones(24))


def diagonal(tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}{Q_PROJ}.lora_diag"] = tensor(np.ones(4))


def saved_base_layer(tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}{Q_PROJ}.base_layer.weight"] = tensor(np.ones((24, 21)))


def saved_module(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.norm.weight"] = tensor(np.ones(21))


def trainable_tokens(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = tensor(
        np.ones((2, 20))
    )


def long_diagonals(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        tensors[name.replace("lora_A.weight", "lora_diag")] = tensor(np.ones(5))


def experts(tensors: dict[str, Tensor]) -> None:
    key = f"{PREFIX}model.layers.0.mlp.experts.lora_{{}}.weight"
    tensors[key.format("A")] = tensor(np.ones((12, 20)))
    tensors[key.format("B")] = tensor(np.ones((16, 12)))


# What cannot be merged: the settings, what goes into the file, a word of the message.
UNSUPPORTED: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], None] | None, str]] = {
    "OFT": ({"peft_type": "OFT"}, None, "OFT"),
    "BOFT": ({"peft_type": "BOFT"}, None, "BOFT"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, None, "PROMPT_TUNING"),
    "an unknown type": ({"peft_type": "FROM_THE_FUTURE"}, None, "FROM_THE_FUTURE"),
    "LoftQ": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
        None,
        "loftq",
    ),
    "CorDA": ({"init_lora_weights": "corda", "corda_config": {}}, None, "corda"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, None, "lora_ga"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2, 3]}, None, "alora_invocation_tokens"),
    "QALoRA": ({"use_qalora": True, "qalora_group_size": 16}, None, "use_qalora"),
    "Arrow": ({"arrow_config": {"top_k": 3}}, None, "arrow_config"),
    "one part of Megatron's": (
        {"megatron_config": {"tensor_model_parallel_size": 4}},
        None,
        "megatron_config",
    ),
    "a start that nobody knows": (
        {"init_lora_weights": "from_the_future"},
        None,
        "from_the_future",
    ),
    "a field from the future": ({"use_better_lora": True}, None, "use_better_lora"),
}


def stray(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.other.weight"] = tensor(np.ones((24, 20)))


# Config and tensors that contradict each other, or tensors that have no place.
CONTRADICTIONS: dict[
    str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], None] | None, type[Exception], str]
] = {
    "DoRA by its keys alone": ({}, magnitude, lorafast.AdapterError, "use_dora"),
    "DoRA without magnitudes": ({"use_dora": True}, None, lorafast.AdapterError, "magnitude"),
    "lora_bias by its keys alone": ({}, bias_of_b, lorafast.AdapterError, "lora_bias"),
    "lora_bias without biases": ({"lora_bias": True}, None, lorafast.AdapterError, "lora_bias"),
    "KaSA by its keys alone": ({}, diagonal, lorafast.AdapterError, "kasa_config"),
    "KaSA without diagonals": ({"kasa_config": {}}, None, lorafast.AdapterError, "lora_diag"),
    "KaSA's diagonal of another rank": (
        {"kasa_config": {}},
        long_diagonals,
        lorafast.AdapterError,
        "rank 4",
    ),
    "tokens by their keys alone": (
        {},
        trainable_tokens,
        lorafast.AdapterError,
        "trainable_token_indices",
    ),
    "tokens of another module": (
        {"trainable_token_indices": {"wte": [1, 2]}},
        trainable_tokens,
        lorafast.AdapterError,
        "trainable_token_indices",
    ),
    "more tokens than rows": (
        {"trainable_token_indices": [1, 2, 3]},
        trainable_tokens,
        lorafast.AdapterError,
        "3 tokens",
    ),
    "a token twice": (
        {"trainable_token_indices": [2, 2]},
        trainable_tokens,
        lorafast.AdapterError,
        "the token 2 twice",
    ),
    "a negative token": (
        {"trainable_token_indices": [-1, 2]},
        trainable_tokens,
        lorafast.AdapterError,
        "trainable_token_indices",
    ),
    "tokens in no embedding of the base": (
        {"trainable_token_indices": [1, 2]},
        trainable_tokens,
        lorafast.PlanError,
        "embed_tokens",
    ),
    "target_parameters that are no list": (
        {"target_parameters": "mlp.experts"},
        None,
        lorafast.AdapterError,
        "target_parameters",
    ),
    "target_parameters that fit nothing": (
        {"target_parameters": ["experts.gate_up_proj"]},
        experts,
        lorafast.PlanError,
        "experts",
    ),
    "blocks that do not divide A": (
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 3}},
        None,
        lorafast.AdapterError,
        "blocks",
    ),
    "blocks of A wider than the base": (
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}},
        None,
        lorafast.PlanError,
        Q_PROJ,
    ),
    "blocks of B that add up to another rank": (
        {"use_bdlora": {"target_modules_bd_b": ["q_proj"], "nblocks": 2}},
        None,
        lorafast.AdapterError,
        "rank",
    ),
    "both factors in blocks": (
        {
            "use_bdlora": {
                "target_modules_bd_a": ["q_proj"],
                "target_modules_bd_b": ["proj"],
                "nblocks": 2,
            }
        },
        None,
        lorafast.AdapterError,
        "target_modules_bd_b",
    ),
    "no blocks at all": (
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 0}},
        None,
        lorafast.AdapterError,
        "nblocks",
    ),
    "an embedding of another size": ({}, embedding, lorafast.PlanError, "embed_tokens"),
    "a convolution that is not there": ({}, convolution, lorafast.PlanError, "conv"),
    "a saved module of another shape": ({}, saved_module, lorafast.PlanError, "norm"),
    "a saved tensor of no module": ({}, stray, lorafast.PlanError, "other"),
    "a base layer of another shape": ({}, saved_base_layer, lorafast.PlanError, "base_layer"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_tensors_and_config_that_disagree(tmp_path: Path, base: Path, name: str) -> None:
    settings, add, error, word = CONTRADICTIONS[name]
    tensors = adapter_tensors()
    if add is not None:
        add(tensors)
    adapter = make_adapter(tmp_path / "adapter", tensors, **settings)
    refuses(tmp_path, error, base, adapter, str(adapter), word)


EMBEDDING = "model.embed_tokens.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("shape", "tokens", "words"),
    [
        ((9, 20), [1, 9], ["token 9", "9 rows"]),
        ((9, 24), [1, 2], ["[9, 24]"]),
        ((20,), [1, 2], ["[20]"]),
    ],
)
def test_trained_tokens_that_the_embedding_does_not_have(
    tmp_path: Path, shape: tuple[int, ...], tokens: list[int], words: list[str]
) -> None:
    base = make_base(tmp_path / "base", others={EMBEDDING: tensor(np.zeros(shape))})
    tensors = adapter_tensors()
    trainable_tokens(tensors)
    adapter = make_adapter(tmp_path / "adapter", tensors, trainable_token_indices=tokens)
    refuses(tmp_path, lorafast.PlanError, base, adapter, str(adapter), EMBEDDING, *words)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        # Two experts where the factors are those of three; then none of either width.
        ((2, 16, 20), ["experts"]),
        ((3, 16, 21), ["experts"]),
        ((3, 17, 20), ["experts"]),
        ((16, 20), ["experts"]),
        # Square: nothing tells which way the factors lie.
        ((3, 20, 20), ["expert_layout"]),
    ],
    ids=str,
)
def test_experts_that_the_factors_do_not_fit(
    tmp_path: Path, shape: tuple[int, ...], words: list[str]
) -> None:
    base = make_base(tmp_path / "base", others={EXPERTS: tensor(np.zeros(shape))})
    tensors = adapter_tensors()
    experts(tensors)
    if shape[-2:] == (20, 20):
        key = f"{PREFIX}model.layers.0.mlp.experts.lora_B.weight"
        tensors[key] = tensor(np.ones((20, 12)))
    adapter = make_adapter(
        tmp_path / "adapter", tensors, target_parameters=["mlp.experts.gate_up_proj"]
    )
    refuses(tmp_path, lorafast.LorafastError, base, adapter, str(adapter), *words)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_feature_that_cannot_be_merged(tmp_path: Path, base: Path, name: str) -> None:
    settings, add, word = UNSUPPORTED[name]
    tensors = adapter_tensors()
    if add is not None:
        add(tensors)
    adapter = make_adapter(tmp_path / "adapter", tensors, **settings)
    refuses(tmp_path, lorafast.UnsupportedAdapterError, base, adapter, str(adapter), word)


@pytest.mark.parametrize(
    "settings",
    [{"init_lora_weights": value} for value in (True, False, "gaussian", "orthogonal", "eva", None)]
    + [
        {"lora_dropout": 0.5},
        {"peft_version": "0.21.2"},
        {"auto_mapping": None, "revision": "main", "task_type": None},
        {"modules_to_save": [], "trainable_token_indices": [], "target_parameters": []},
        {"use_qalora": False, "qalora_group_size": 16, "arrow_config": None, "eva_config": None},
        {"megatron_core": "megatron.core", "runtime_config": {"ephemeral_gpu_offload": False}},
        {"loftq_config": {}, "corda_config": None, "exclude_modules": ["k_proj"]},
        {"a_field_from_the_future": None, "another": False},
    ],
    ids=str,
)
def test_settings_that_do_not_change_the_result(
    tmp_path: Path, base: Path, settings: dict[str, Any]
) -> None:
    lorafast.merge(base, make_adapter(tmp_path / "plain"), tmp_path / "expected")
    lorafast.merge(base, make_adapter(tmp_path / "adapter", **settings), tmp_path / "out")
    assert read_checkpoint(tmp_path / "out") == read_checkpoint(tmp_path / "expected")
    assert read_checkpoint(tmp_path / "out") != read_checkpoint(base)


@pytest.mark.parametrize("wrapper", ["", "modules_to_save."])
def test_a_lora_on_a_head_that_the_adapter_brings_is_refused_for_that(
    wrapper: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base")
    score = f"{PREFIX}score.{wrapper}"
    whole = f"{score}base_layer.weight" if wrapper else f"{score}weight"
    tensors = adapter_tensors() | {
        f"{score}lora_A.weight": tensor(np.ones((4, 20))),
        f"{score}lora_B.weight": tensor(np.ones((3, 4))),
        whole: tensor(np.ones((3, 20))),
    }
    adapter = make_adapter(tmp_path / "adapter", tensors, modules_to_save=["score"])
    with pytest.raises(lorafast.PlanError) as raised:
        lorafast.plan(base, adapter)
    (problem,) = raised.value.problems
    assert "its module score is saved whole and has a LoRA as well" in problem
    assert "the base has no score.weight" in problem
