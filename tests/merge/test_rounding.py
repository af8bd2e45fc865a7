"""What rounding takes away of a merge's changes, as the merge itself measures it."""

from __future__ import annotations

from pathlib import Path

import lorafast
import numpy as np
import pytest
from support.files import read_checkpoint, tensor
from support.handmade import MODULES, PREFIX, make_adapter, make_base

SHAPE = (480, 96)
WIDE = dict.fromkeys(MODULES, SHAPE)


def factors(size: float, seed: int = 5) -> dict[str, object]:
    random = np.random.default_rng(seed)
    tensors = {}
    for module in WIDE:
        a = random.normal(size=(4, SHAPE[1]))
        b = random.normal(scale=size, size=(SHAPE[0], 4))
        tensors[f"{PREFIX}{module}.lora_A.weight"] = tensor(a, "F32")
        tensors[f"{PREFIX}{module}.lora_B.weight"] = tensor(b, "F32")
    return tensors


def lost(base: Path, exact: Path, output: Path) -> float:
    """The true share, over all merged weights."""
    before, right, after = map(read_checkpoint, (base, exact, output))
    error = change = 0.0
    for module in WIDE:
        name = f"{module}.weight"
        start = before[name].float64()
        error += float(np.square(after[name].float64() - right[name].float64()).sum())
        change += float(np.square(right[name].float64() - start).sum())
    return float(np.sqrt(error / change))


@pytest.mark.parametrize("stored", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", [1e-5, 3e-4, 1e-2])
@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_a_merge_measures_what_rounding_takes_away(
    tmp_path: Path, stored: str, dtype: str, size: float, kind: str
) -> None:
    base = make_base(tmp_path / "base", modules=WIDE, dtype=stored)
    tensors = factors(size)
    if kind == "dora":
        random = np.random.default_rng(9)
        for module in WIDE:
            start = read_checkpoint(base)[f"{module}.weight"].float64()
            norms = np.linalg.norm(start, axis=1) * (1 + size * random.normal(size=SHAPE[0]))
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = tensor(norms, "F32")
    adapter = make_adapter(tmp_path / "adapter", tensors, use_dora=kind == "dora")
    lorafast.merge(base, adapter, tmp_path / "exact", dtype="float32")
    report = lorafast.merge(base, adapter, tmp_path / "out", dtype=dtype)
    written = stored if dtype == "auto" else {"b": "BF16", "f": "F16"}[dtype[0]]
    if dtype == "float32":
        written = "F32"
    if written == "F32":
        assert report.rounding is None
        return
    expected = lost(base, tmp_path / "exact", tmp_path / "out")
    assert report.rounding is not None
    # A sample of few rows, and changes that are themselves rounded to 16 bits.
    assert report.rounding["lost"] == pytest.approx(expected, rel=0.2, abs=0.01)
    warned = any("rounding takes away" in warning for warning in report.warnings)
    assert warned == (report.rounding["lost"] >= 0.2)
    checked = lorafast.verify(base, adapter, tmp_path / "out")
    assert report.rounding["lost"] == pytest.approx(checked.lost, rel=0.3, abs=0.01)


@pytest.mark.parametrize("size", [1e-5, 1e-2])
def test_so_does_one_that_torch_makes(tmp_path: Path, size: float) -> None:
    pytest.importorskip("torch")
    base = make_base(tmp_path / "base", modules=WIDE, dtype="BF16")
    adapter = make_adapter(tmp_path / "adapter", factors(size))
    ours = lorafast.merge(base, adapter, tmp_path / "cpu").rounding
    theirs = lorafast.merge(base, adapter, tmp_path / "torch", device="torch:cpu").rounding
    assert ours is not None
    assert theirs is not None
    assert theirs["values"] == len(WIDE) * SHAPE[1]
    assert theirs["lost"] == pytest.approx(ours["lost"], rel=0.2, abs=0.01)
