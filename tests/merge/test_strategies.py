"""Every strategy, number of adapters, dtype and number of threads, against float64."""

from __future__ import annotations

import json
from pathlib import Path

import lorafast
import numpy as np
import pytest
from support.compare import assert_merged_like_float64, assert_rest_untouched
from support.files import Tensor, narrow, read_checkpoint, snapshot, tensor
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base
from support.models import Models
from support.reference import merge_float64

DTYPES = ["F64", "F32", "BF16", "F16"]
# Of some 3000 elements of float16 one to four may be rounded the other way: float32 sums are off by
# some 2^-24 of their terms, and so are any other implementation's.
FEW = 0.998
REPORTS = {"README.md", "merge_report.json", "merge_report.md"}


def make_adapters(folder: Path, count: int) -> list[Path]:
    """Adapters of different ranks, scales, dtypes and targets."""
    some = dict(list(MODULES.items())[1:3])
    kinds = [
        (adapter_tensors(rank=4, seed=1), {"r": 4, "lora_alpha": 8}),
        (
            adapter_tensors(some, rank=7, dtype="BF16", seed=2),
            {"r": 7, "lora_alpha": 3.5, "use_rslora": True},
        ),
        (adapter_tensors(rank=33, dtype="F16", seed=3), {"r": 33, "lora_alpha": 33}),
    ]
    return [
        make_adapter(folder / f"adapter-{number}", tensors, **settings)
        for number, (tensors, settings) in enumerate(kinds[:count])
    ]


def model_bytes(output: Path) -> dict[str, str]:
    """The hashes of everything but the reports, which hold times and paths."""
    return {name: value for name, value in snapshot(output).items() if name not in REPORTS}


STRATEGIES = [
    ("sequential", None),
    ("average", None),
    ("weighted", None),
    ("weighted", [0.7, 0.3, 1.5]),
    ("weighted", [-1.25, 0.5, -0.1]),
    ("weighted", [0.0, 2.0, 0.0]),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("strategy", "weights"), STRATEGIES)
def test_against_float64(
    tmp_path: Path, strategy: str, weights: list[float] | None, count: int, dtype: str
) -> None:
    base = make_base(tmp_path / "base", dtype=dtype, shards=2)
    adapters = make_adapters(tmp_path, count)
    weights = weights and weights[:count]
    report = lorafast.merge(base, adapters, tmp_path / "out", strategy=strategy, weights=weights)

    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    terms = merge_float64(before, adapters, strategy, weights)
    assert_merged_like_float64(after, terms, identical=FEW)
    assert_rest_untouched(after, before, terms)
    assert report.strategy == strategy
    assert len(report.adapters) == count


@pytest.mark.parametrize("strategy", ["sequential", "weighted", "average"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_three_adapters_that_peft_made(
    models: Models, tmp_path: Path, dtype: str, strategy: str
) -> None:
    base = models.llama(dtype)
    common = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    adapters = [
        models.adapter("one", models.llama(), seed=1, r=4, lora_alpha=8, **common),
        models.adapter("two", models.llama(), seed=2, r=16, lora_alpha=16, **common),
        models.adapter(
            "three", models.llama(), seed=3, r=6, lora_alpha=9, use_rslora=True, **common
        ),
    ]
    weights = [0.6, -0.3, 1.1] if strategy == "weighted" else None
    lorafast.merge(base, adapters, tmp_path / "out", strategy=strategy, weights=weights)
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    terms = merge_float64(before, adapters, strategy, weights)
    assert_merged_like_float64(after, terms)
    assert_rest_untouched(after, before, terms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_adapter_at_weight_one_is_the_same_under_every_strategy(
    tmp_path: Path, dtype: str
) -> None:
    base = make_base(tmp_path / "base", dtype=dtype)
    adapters = make_adapters(tmp_path, 1)
    written = []
    for number, (strategy, weights) in enumerate(
        [("sequential", None), ("average", None), ("weighted", None), ("weighted", [1.0])]
    ):
        output = tmp_path / f"out-{number}"
        # Without a card, which names the strategy.
        options = {"strategy": strategy, "weights": weights}
        lorafast.merge(base, adapters, output, report=False, **options)
        written.append(model_bytes(output))
    assert written[1:] == written[:1] * 3


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_same_bytes_with_any_number_of_threads(tmp_path: Path, dtype: str) -> None:
    # Several tiles of rows, and none of them full.
    modules = {
        "model.layers.0.mlp.up_proj": (3001, 517),
        "model.layers.0.mlp.down_proj": (37, 3001),
    }
    base = make_base(tmp_path / "base", modules=modules, dtype=dtype)
    adapters = [
        make_adapter(tmp_path / "a", adapter_tensors(modules, rank=19), r=19, lora_alpha=8),
        make_adapter(tmp_path / "b", adapter_tensors(modules, rank=3, seed=5), r=3, lora_alpha=8),
    ]
    written = []
    for threads in (1, 2, 7, None):
        output = tmp_path / f"out-{threads}"
        lorafast.merge(base, adapters, output, threads=threads)
        written.append(model_bytes(output))
    assert written[1:] == written[:1] * 3
    terms = merge_float64(read_checkpoint(base), adapters)
    assert_merged_like_float64(read_checkpoint(tmp_path / "out-7"), terms)


def test_adapters_and_their_negatives_cancel(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="BF16")
    (adapter,) = make_adapters(tmp_path, 1)
    lorafast.merge(
        base, [adapter, adapter], tmp_path / "out", strategy="weighted", weights=[2.0, -2.0]
    )
    assert read_checkpoint(tmp_path / "out") == read_checkpoint(base)


SAME_DTYPE = {"float32": "F32", "fp32": "F32", "float16": "F16", "fp16": "F16"} | {
    "bfloat16": "BF16",
    "bf16": "BF16",
}


@pytest.mark.parametrize("entry", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("before", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("requested", SAME_DTYPE)
def test_the_output_in_another_dtype(
    tmp_path: Path, requested: str, before: str, entry: str
) -> None:
    integers = tensor([[1, 2, 3]], "I64")
    base = make_base(tmp_path / "base", dtype=before, shards=2, others={"positions": integers})
    config = json.loads((base / "config.json").read_text())
    config = {"model_type": "llama", "hidden_size": 20, entry: config["torch_dtype"]}
    (base / "config.json").write_text(json.dumps(config))
    adapters = make_adapters(tmp_path, 2)
    output = tmp_path / "out"
    lorafast.merge(base, adapters, output, dtype=requested)

    wanted = SAME_DTYPE[requested]
    source, result = read_checkpoint(base), read_checkpoint(output)
    terms = merge_float64(source, adapters)
    assert_merged_like_float64(result, terms, identical=FEW)
    assert all(result[name].dtype == wanted for name in terms)
    for name, value in source.items():
        if name == "positions":
            assert result[name] == integers
        elif name not in terms:
            assert result[name] == Tensor(wanted, value.shape, narrow(value.float64(), wanted))
    long_name = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[wanted]
    assert json.loads((output / "config.json").read_text()) == config | {entry: long_name}
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(t.data) for t in result.values())


def test_one_rounding_for_all_adapters_together(tmp_path: Path) -> None:
    """Two updates of a bit less than half an ulp each move a bfloat16 weight by one ulp."""
    modules = {"model.layers.0.self_attn.q_proj": (16, 16)}
    base = make_base(tmp_path / "base", modules=modules, dtype="BF16")
    name = "model.layers.0.self_attn.q_proj.weight"
    ones = {name: tensor(np.ones((16, 16)), "BF16")}
    from support.files import write_safetensors

    write_safetensors(base / "model.safetensors", ones)
    key = f"base_model.model.{name.removesuffix('.weight')}"
    small = {
        f"{key}.lora_A.weight": tensor(np.ones((1, 16))),
        f"{key}.lora_B.weight": tensor(np.full((16, 1), 0.45 * 2.0**-7)),
    }
    adapter = make_adapter(tmp_path / "a", small, r=1, lora_alpha=1)
    lorafast.merge(base, adapter, tmp_path / "once")
    lorafast.merge(base, [adapter, adapter], tmp_path / "twice")
    assert (read_checkpoint(tmp_path / "once")[name].float64() == 1).all()
    assert (read_checkpoint(tmp_path / "twice")[name].float64() == 1 + 2.0**-7).all()
