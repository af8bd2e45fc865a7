"""Exact merges of random elements, each held against the real number in whole numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from numpy.typing import NDArray
from support.files import Tensor, narrow, read_checkpoint, write_safetensors
from support.handmade import make_adapter
from support.reference import PREFIX
from support.trust.figures import Figures, count, generator

MODULE = "model.layers.0.q_proj"
RANK, COLUMNS = 3, 500
#: A number times this is whole: below 2⁻¹⁴⁹ there is no float32, and products have two of them.
DIGITS = 300
NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
INTEGERS = {"BF16": "<u2", "F16": "<u2", "F32": "<u4"}


def whole(values: NDArray[np.float64], digits: int) -> NDArray[Any]:
    """Numbers times 2^digits, as Python's integers."""
    significands, exponents = np.frexp(values)
    integers = np.ldexp(significands, 53).astype(np.int64).astype(object)
    shifts = (exponents.astype(np.int64) - 53 + digits).astype(object)
    return np.left_shift(integers, shifts)


def neighbors(values: Tensor) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]:
    """The middles to the next smaller and the next larger number, and which numbers are even.

    The sign bit counts from the other side, so that numbers are in the order of their places.
    """
    kind = INTEGERS[values.dtype]
    bits = np.frombuffer(values.data, kind).astype(np.int64)
    top = np.int64(1) << (np.dtype(kind).itemsize * 8 - 1)
    place = np.where(bits & top, -(bits & (top - 1)), bits)

    def at(places: NDArray[np.int64]) -> NDArray[Any]:
        turned = np.where(places < 0, (-places) | top, places).astype(kind)
        return whole(Tensor(values.dtype, turned.shape, turned.tobytes()).float64(), DIGITS + 2)

    here = at(place)
    return (here + at(place - 1)) // 2, (here + at(place + 1)) // 2, (bits & 1) == 0


def drawn(random: np.random.Generator, shape: tuple[int, ...], kind: int) -> NDArray[np.float64]:
    """Numbers of many digits, of few (so that sums are ties), or of any size."""
    if kind == 0:
        return random.normal(size=shape)
    if kind == 1:
        return random.integers(-3, 4, size=shape) * 2.0 ** random.integers(-9, 1, size=shape)
    return random.normal(size=shape) * 2.0 ** random.integers(-9, 5, size=shape)


@pytest.mark.parametrize("written", NAMES)
def test_random_elements_are_rounded_as_whole_numbers_say(
    tmp_path: Path, figures: Callable[[str], Figures], written: str
) -> None:
    program = f"exact sums, {written}"
    random = np.random.default_rng(generator(program).randrange(2**32))
    wanted = count("exact_sums", 60_000) // len(NAMES)
    kept, rounds = figures(program), 0
    while kept.counts["elements"] < wanted:
        rows = min(200, 1 + wanted // (10 * COLUMNS))
        # Few digits everywhere every fourth time, or there would be no ties.
        kinds = [1, 1, 1] if rounds % 4 == 0 else random.integers(3, size=3).tolist()
        stored = ("BF16", "F16", "F32")[rounds % 4 % 3]
        factor = ("F32", "BF16", "F16")[rounds // 2 % 3]
        rounds += 1
        weight, left, right = (
            Tensor(dtype, shape, narrow(drawn(random, shape, kind), dtype))
            for dtype, shape, kind in zip(
                (stored, factor, factor),
                ((rows, COLUMNS), (rows, RANK), (RANK, COLUMNS)),
                kinds,
                strict=True,
            )
        )
        for name in ("base", "adapter", "out"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        (tmp_path / "base").mkdir()
        write_safetensors(tmp_path / "base/model.safetensors", {f"{MODULE}.weight": weight})
        made = {
            f"{PREFIX}{MODULE}.lora_A.weight": right,
            f"{PREFIX}{MODULE}.lora_B.weight": left,
        }
        # The scale is 0.75, which has two digits.
        adapter = make_adapter(
            tmp_path / "adapter", made, r=RANK, lora_alpha=2.25, target_modules=["q_proj"]
        )
        report = lorafast.merge(
            tmp_path / "base",
            adapter,
            tmp_path / "out",
            precision="exact",
            dtype=NAMES[written],
            report=False,
            sync=False,
        )
        assert report.recomputed is not None
        found = read_checkpoint(tmp_path / "out")[f"{MODULE}.weight"]
        below, above, even = neighbors(found)
        half = DIGITS // 2
        product = whole(left.float64(), half) @ whole(right.float64(), half)
        total = (whole(weight.float64(), DIGITS) * 4 + product * 3).reshape(-1)
        outside = (total < below) | (total > above)
        outside |= ((total == below) | (total == above)) & ~even
        # A zero is +0, and what is rounded to zero keeps its sign.
        values = found.float64().reshape(-1)
        outside |= (values == 0) & (np.signbit(values) != (total < 0))
        kept.expect(
            not outside.any(),
            f"{outside.sum()} of {outside.size}: W {stored}, factors {factor}, kinds {kinds}",
        )
        kept.counts.update(
            {
                "elements": outside.size,
                "near ties": report.recomputed["near_ties"],
                "decided in integers": report.recomputed["in_integers"],
            }
        )
    kept.expect(kept.counts["decided in integers"], "no tie was met")
    kept.settle()
