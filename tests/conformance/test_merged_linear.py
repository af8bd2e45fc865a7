"""PEFT's first MergedLinear: a fused weight of which some of the equal parts have factors.

PEFT 0.2 was its last release, so the reference is what its layer computes, a convolution in groups
over the inner vectors whose outputs are spread over the parts, here in float64.
"""

from __future__ import annotations

import json
from pathlib import Path

import lorafast
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.compare import assert_merged_like_float64, assert_rest_untouched
from support.files import Tensor, read_checkpoint, tensor
from support.handmade import adapter_config, make_adapter, make_base
from support.reference import PREFIX, Merged, merge_float64

MODULE = "transformer.h.0.attn.c_attn"
RANK = 4
WIDTH = 18
HEIGHT = 12
ENABLED = [
    [True, False, True],
    [True, True, True],
    [False, True, False],
    [True, True],
    [False, True, True, False],
    [True],
]


def delta(a: Tensor, b: Tensor, enabled: list[bool], scale: float) -> NDArray[np.float64]:
    """s·zero_pad(conv1d(A·x)) of each unit vector x, as columns: what the layer adds to W."""
    inner = torch.from_numpy(a.float64().copy())
    kernel = torch.from_numpy(b.float64().copy())
    groups = inner.shape[0] // kernel.shape[1]
    outputs = torch.nn.functional.conv1d(inner.unsqueeze(0), kernel, groups=groups)[0]
    spread = np.zeros((len(enabled), HEIGHT, WIDTH))
    spread[np.asarray(enabled)] = outputs.reshape(-1, HEIGHT, WIDTH).numpy()
    return scale * spread.reshape(-1, WIDTH)


def factors(enabled: list[bool], groups: int, dtype: str = "F32") -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(11)
    inner = RANK * sum(enabled)
    a = tensor(random.normal(scale=0.1, size=(inner, WIDTH)), dtype)
    kernel = random.normal(scale=0.1, size=(HEIGHT * sum(enabled), inner // groups, 1))
    return a, tensor(kernel, dtype)


# PEFT 0.2 always made two groups, loralib one for each part; the file's shapes tell.
@pytest.mark.parametrize("groups", [1, 2, "parts"])
@pytest.mark.parametrize("enabled", ENABLED, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("flag", [False, True], ids=["straight", "fan_in_fan_out"])
def test_parts(
    tmp_path: Path, enabled: list[bool], groups: int | str, transposed: bool, flag: bool
) -> None:
    count = sum(enabled) if groups == "parts" else int(groups)
    a, b = factors(enabled, count)
    rows = HEIGHT * len(enabled)
    shape = (WIDTH, rows) if transposed else (rows, WIDTH)
    base = make_base(
        tmp_path / "base",
        modules={MODULE: shape},
        dtype="BF16",
        config={"model_type": "gpt2" if transposed else "bloom"},
    )
    adapter = make_adapter(
        tmp_path / "adapter",
        {f"{PREFIX}{MODULE}.lora_A.weight": a, f"{PREFIX}{MODULE}.lora_B.weight": b},
        config=adapter_config(
            r=RANK,
            lora_alpha=6,
            enable_lora=enabled,
            fan_in_fan_out=flag,
            merge_weights=False,
            target_modules=["c_attn"],
        ),
    )
    report = lorafast.merge(base, adapter, tmp_path / "out", verify=True)
    assert report.tensors_merged == 1
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    added = delta(a, b, enabled, 6 / RANK)
    added = added.T if transposed else added
    start = before[f"{MODULE}.weight"].float64()
    terms = {f"{MODULE}.weight": Merged(start + added, np.abs(start) + np.abs(added))}
    assert_merged_like_float64(after, terms, identical=0.99)
    assert_rest_untouched(after, before, terms)
    # The parts without factors are the base's to the bit, and the others are not.
    same = (after[f"{MODULE}.weight"].float64() == start).all(axis=0 if transposed else 1)
    changed = ~same.reshape(len(enabled), HEIGHT).all(axis=1)
    assert changed.tolist() == enabled
    # The suite's own reference says the same as the layer.
    (known,) = merge_float64(before, [adapter], transposed=lambda _: transposed).values()
    np.testing.assert_allclose(known.value, start + added, rtol=1e-12, atol=1e-15)


def test_factors_that_are_none_of_its(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", modules={MODULE: (3 * HEIGHT, WIDTH)})
    a, b = factors([True, False, True], 2)

    def refused(name: str, enabled: object, a: Tensor, b: Tensor, error: type[Exception]) -> str:
        adapter = make_adapter(
            tmp_path / name,
            {f"{PREFIX}{MODULE}.lora_A.weight": a, f"{PREFIX}{MODULE}.lora_B.weight": b},
            r=RANK,
            enable_lora=enabled,
        )
        with pytest.raises(error) as caught:
            lorafast.merge(base, adapter, tmp_path / "out")
        assert str(adapter) in str(caught.value)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    error = lorafast.AdapterError
    assert "enable_lora" in refused("text", "yes", a, b, error)
    assert "enable_lora" in refused("none", [False, False], a, b, error)
    # Three parts of four more rows than the base has, and ranks that are not the config's.
    assert MODULE in refused("parts", [True, False, True, False], a, b, lorafast.PlanError)
    assert "rank" in refused("ranks", [True, True, True], a, b, error)
    flat = tensor(np.ones(b.shape[:2]))
    assert "no pair of factors" in refused("flat", [True, False, True], a, flat, error)


def test_the_config_of_the_first_layout_is_covered(tmp_path: Path) -> None:
    a, b = factors([True, False, True], 2)
    adapter = make_adapter(
        tmp_path / "adapter",
        {f"{PREFIX}{MODULE}.lora_A.weight": a, f"{PREFIX}{MODULE}.lora_B.weight": b},
        r=RANK,
        enable_lora=[True, False, True],
        merge_weights=False,
    )
    coverage = lorafast.inspect(adapter)["adapter"]["coverage"]
    uses = {entry["name"]: entry["use"] for entry in coverage["fields"]}
    assert uses["enable_lora"] == "used"
    assert uses["merge_weights"] == "not_needed"
    assert uses.keys() == json.loads((adapter / "adapter_config.json").read_text()).keys()
