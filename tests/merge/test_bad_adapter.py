"""An adapter that is broken, unsupported or does not fit is refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import lorafast
import numpy as np
import pytest
from support.files import read_checkpoint, tensor
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
