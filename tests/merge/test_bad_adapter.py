"""An adapter that is broken, unsupported or does not fit is refused by name."""

from __future__ import annotations

import gc
import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import Tensor, read_checkpoint, tensor
from support.handmade import adapter_config, adapter_tensors, make_adapter, make_base
from support.reference import PREFIX
from support.refusal import refuses

Q_PROJ = "model.layers.0.self_attn.q_proj"
Q_PROJ_A = f"{PREFIX}{Q_PROJ}.lora_A.weight"
Q_PROJ_B = f"{PREFIX}{Q_PROJ}.lora_B.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def test_no_such_adapter(tmp_path: Path, base: Path) -> None:
    missing = tmp_path / "absent" / "adapter"
    refuses(tmp_path, FileNotFoundError, base, missing, str(missing))


def test_the_second_of_two_is_missing(tmp_path: Path, base: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    missing = tmp_path / "absent"
    refuses(tmp_path, FileNotFoundError, base, [adapter, missing], str(missing))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_is_missing(tmp_path: Path, base: Path, name: str) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / name).unlink()
    refuses(tmp_path, (lorafast.AdapterError, FileNotFoundError), base, adapter, str(adapter), name)


BROKEN_CONFIGS = {
    "empty": "",
    "cut off": '{"peft_type": "LORA", "r": 4',
    "a list": "[]",
    "null": "null",
    "not utf-8": "\xff\xfe",
    "of another kind": json.dumps({"model_type": "llama", "hidden_size": 20}),
    "no rank": json.dumps({k: v for k, v in adapter_config().items() if k != "r"}),
    "rank zero": json.dumps(adapter_config(r=0)),
    "rank negative": json.dumps(adapter_config(r=-4)),
    "rank no whole number": json.dumps(adapter_config(r=4.5)),
    "rank a text": json.dumps(adapter_config(r="four")),
    "rank too large for anything": json.dumps(adapter_config(r=2**70)),
    "alpha NaN": json.dumps(adapter_config(lora_alpha=float("nan"))),
    "alpha infinite": json.dumps(adapter_config(lora_alpha=float("inf"))),
    "alpha too large for a float": json.dumps(adapter_config(lora_alpha=8)).replace(
        '"lora_alpha": 8', '"lora_alpha": 1e999'
    ),
    "alpha a text": json.dumps(adapter_config(lora_alpha="8")),
    "rank zero in a pattern": json.dumps(adapter_config(rank_pattern={"q_proj": 0})),
    "alpha NaN in a pattern": json.dumps(adapter_config(alpha_pattern={"q_proj": float("nan")})),
    "a pattern that is no expression": json.dumps(adapter_config(rank_pattern={"q_proj(": 4})),
    "patterns in a list": json.dumps(adapter_config(rank_pattern=[4])),
    "rank stabilised by a text": json.dumps(adapter_config(use_rslora="yes")),
}


@pytest.mark.parametrize("kind", BROKEN_CONFIGS)
def test_a_broken_config(tmp_path: Path, base: Path, kind: str) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "adapter_config.json").write_bytes(BROKEN_CONFIGS[kind].encode("latin-1"))
    refuses(tmp_path, lorafast.AdapterError, base, adapter, str(adapter))


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_file(tmp_path: Path, base: Path, kept: int) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refuses(tmp_path, lorafast.AdapterError, base, adapter, str(file))


def test_a_header_longer_than_the_file(tmp_path: Path, base: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])
    refuses(tmp_path, lorafast.AdapterError, base, adapter, str(file), "header")


@pytest.mark.parametrize("lost", [Q_PROJ_A, Q_PROJ_B])
def test_one_factor_without_the_other(tmp_path: Path, base: Path, lost: str) -> None:
    tensors = adapter_tensors()
    del tensors[lost]
    adapter = make_adapter(tmp_path / "adapter", tensors)
    refuses(tmp_path, lorafast.LorafastError, base, adapter, Q_PROJ, "lora_A", "lora_B")


def test_no_tensors_at_all(tmp_path: Path, base: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", {})
    refuses(tmp_path, lorafast.LorafastError, base, adapter, str(adapter))


@pytest.mark.parametrize("dtype", ["I64", "I8", "U8", "BOOL"])
def test_factors_of_integers(tmp_path: Path, base: Path, dtype: str) -> None:
    factors = {Q_PROJ_A: tensor(np.ones((4, 20)), dtype)}
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors() | factors)
    refuses(tmp_path, lorafast.LorafastError, base, adapter, Q_PROJ_A, dtype)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_factors_that_are_not_finite(tmp_path: Path, base: Path, value: float) -> None:
    values = np.ones((4, 20))
    values[3, 19] = value
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors() | {Q_PROJ_A: tensor(values)})
    refuses(
        tmp_path,
        (lorafast.NumericError, lorafast.AdapterError),
        base,
        adapter,
        Q_PROJ,
        planned=False,
    )


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.7.self_attn.q_proj.lora_{}.weight",
        "base_model.model.nothing.like.it.lora_{}.weight",
        "base_model.model.q_proj.lora_{}.weight",
        # A part of a name is not a name.
        "base_model.model.model.layers.0.self_attn.q_pro.lora_{}.weight",
    ],
)
def test_a_key_that_fits_nothing_in_the_base(tmp_path: Path, base: Path, key: str) -> None:
    extra = {
        key.format("A"): tensor(np.ones((4, 20))),
        key.format("B"): tensor(np.ones((24, 4))),
    }
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors() | extra)
    module = key.removeprefix(PREFIX).removesuffix(".lora_{}.weight")
    error = refuses(tmp_path, lorafast.PlanError, base, adapter, module, str(adapter))
    assert isinstance(error, lorafast.PlanError)
    assert len(error.problems) == 1
    assert module in error.problems[0]


def test_a_key_that_is_no_factor_at_all(tmp_path: Path, base: Path) -> None:
    extra = {"base_model.model.something_else": tensor(np.ones(3))}
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors() | extra)
    refuses(tmp_path, lorafast.LorafastError, base, adapter, "something_else")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((4, 21), (24, 4)),
        ((4, 20), (25, 4)),
        ((4, 24), (20, 4)),  # fits only transposed, which a Llama's q_proj never is
        ((5, 20), (24, 5)),  # another rank than the config's
        ((4, 20), (24, 5)),
        ((4,), (24, 4)),
        ((4, 20, 1), (24, 4)),
        ((0, 20), (24, 0)),
    ],
)
def test_shapes_that_do_not_fit(
    tmp_path: Path, base: Path, a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    factors = {Q_PROJ_A: tensor(np.ones(a)), Q_PROJ_B: tensor(np.ones(b))}
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors() | factors)
    refuses(tmp_path, lorafast.LorafastError, base, adapter, Q_PROJ)


def test_the_problems_of_every_adapter_are_listed(tmp_path: Path, base: Path) -> None:
    stray = {
        f"{PREFIX}model.layers.{layer}.self_attn.k_proj.lora_{letter}.weight": tensor(
            np.ones(shape)
        )
        for layer in (5, 6)
        for letter, shape in (("A", (4, 20)), ("B", (24, 4)))
    }
    first = make_adapter(tmp_path / "first", adapter_tensors() | stray)
    misfit = {Q_PROJ_A: tensor(np.ones((4, 13)))}
    second = make_adapter(tmp_path / "second", adapter_tensors() | misfit)
    error = refuses(tmp_path, lorafast.PlanError, base, [first, second], "k_proj", Q_PROJ)
    assert isinstance(error, lorafast.PlanError)
    assert [str(first) in problem for problem in error.problems] == [True, True, False]
    assert str(second) in error.problems[2]
    for problem, part in zip(error.problems, ("layers.5", "layers.6", Q_PROJ), strict=True):
        assert part in problem


def test_problems_of_every_kind_are_listed(tmp_path: Path, base: Path) -> None:
    wrong = {
        f"{PREFIX}model.layers.{layer}.self_attn.k_proj.lora_{letter}.weight": tensor(
            np.ones(shape)
        )
        for layer in (5, 6)
        for letter, shape in (("A", (4, 20)), ("B", (24, 4)))
    }
    misfit = {Q_PROJ_A: tensor(np.ones((4, 13)))}
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors() | wrong | misfit)
    error = refuses(tmp_path, lorafast.PlanError, base, adapter, "k_proj", Q_PROJ)
    assert isinstance(error, lorafast.PlanError)
    assert len(error.problems) == 3
    for part in ("layers.5.self_attn.k_proj", "layers.6.self_attn.k_proj", Q_PROJ):
        assert sum(part in problem for problem in error.problems) == 1


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
    "IA3": ({"peft_type": "IA3"}, None, "IA3"),
    "LOHA": ({"peft_type": "LOHA"}, None, "LOHA"),
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


@pytest.mark.real_data
def test_adapters_of_others_that_are_no_lora(real_data: Path, tmp_path: Path, base: Path) -> None:
    found = 0
    for config in sorted((real_data / "adapters").glob("*/adapter_config.json")):
        try:
            kind = json.loads(config.read_text()).get("peft_type")
        except ValueError:
            continue
        if kind not in {"LORA", None}:
            found += 1
            with pytest.raises(lorafast.UnsupportedAdapterError, match=kind):
                lorafast.plan(base, config.parent)
    assert found, "the folder holds no such adapter any more"


def test_an_adapter_that_was_never_trained_is_a_warning(tmp_path: Path, base: Path) -> None:
    zeros = {
        name: tensor(np.zeros(value.shape)) if ".lora_B." in name else value
        for name, value in adapter_tensors().items()
    }
    adapter = make_adapter(tmp_path / "untrained", zeros)
    trained = make_adapter(tmp_path / "trained")
    report = lorafast.merge(base, [trained, adapter], tmp_path / "out")
    assert any(str(adapter) in warning for warning in report.warnings)
    assert not any(str(trained) in warning for warning in report.warnings)
    report = lorafast.merge(base, adapter, tmp_path / "alone")
    assert report.warnings
    assert read_checkpoint(tmp_path / "alone") == read_checkpoint(base)
    assert lorafast.merge(base, trained, tmp_path / "quiet").warnings == []


def test_one_untrained_module_is_no_warning_about_the_adapter(tmp_path: Path, base: Path) -> None:
    tensors = adapter_tensors() | {Q_PROJ_B: tensor(np.zeros((24, 4)))}
    adapter = make_adapter(tmp_path / "adapter", tensors)
    lorafast.merge(base, adapter, tmp_path / "out")
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    assert after[f"{Q_PROJ}.weight"] == before[f"{Q_PROJ}.weight"]
    assert after != before


def test_nothing_is_unpickled(tmp_path: Path, base: Path) -> None:
    """A .bin is read with weights_only: what it would run is not run."""
    pytest.importorskip("torch")
    import pickle

    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    witness = tmp_path / "witness"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (witness,))

    (adapter / "adapter_model.bin").write_bytes(pickle.dumps({Q_PROJ_A: Payload()}))
    with pytest.raises(lorafast.AdapterError, match=r"adapter_model\.bin"):
        lorafast.merge(base, adapter, tmp_path / "out")
    assert not witness.exists()
    assert not (tmp_path / "out").exists()


def test_a_bin_holds_the_same_adapter(tmp_path: Path, base: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    lorafast.merge(base, adapter, tmp_path / "expected")
    pickle_weights(adapter)
    lorafast.merge(base, adapter, tmp_path / "out")
    assert read_checkpoint(tmp_path / "out") == read_checkpoint(tmp_path / "expected")


def pickle_weights(adapter: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()


def test_a_bin_leaves_no_temporary_files(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    pickle_weights(adapter)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lorafast.merge(base, adapter, tmp_path / "out")
        gc.collect()
    assert not list(scratch.iterdir())
    assert not [w for w in caught if issubclass(w.category, ResourceWarning)]


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
