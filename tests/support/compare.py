"""Comparisons that count, in units in the last place, and that no NaN passes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from support.files import Tensor, narrow
from support.reference import Merged

# What a float32 sum of some dozen terms may be off, relative to the sum of their absolute values.
# It matters only where the terms cancel to less than 1/10000 of themselves.
FLOAT32_SUM = 2.0**-22


def ordered(bits: NDArray[np.uint16]) -> NDArray[np.int32]:
    """Integers in the order of the 16-bit floats; neighbours differ by one, -0 equals 0."""
    magnitude = (bits & np.uint16(0x7FFF)).astype(np.int32)
    return np.where(bits & np.uint16(0x8000), -magnitude, magnitude)


def ulp_distance(actual: Tensor, expected: Tensor) -> NDArray[np.int32]:
    """How many representable numbers lie between two tensors' elements, each of 16 bits."""
    assert actual.dtype == expected.dtype
    assert actual.dtype in {"F16", "BF16"}
    assert actual.shape == expected.shape
    assert_finite(actual)
    assert_finite(expected)
    return np.abs(ordered(actual.bits16()) - ordered(expected.bits16()))


def assert_finite(value: Tensor) -> None:
    bad = np.count_nonzero(~np.isfinite(value.float64()))
    assert bad == 0, f"{bad} of {int(np.prod(value.shape))} elements are not finite"


def assert_merged_like(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    terms: Mapping[str, Merged],
    *,
    identical: float = 0.999,
) -> None:
    """Every tensor of `terms` agrees as well as one rounding of a float32 sum can promise.

    float32 (and float64): relative 1e-6 of the value or of the terms it is the sum of.
    float16 and bfloat16: at most 1 ulp, and the same bits in `identical` of all elements.

    Args:
        actual: what was written.
        expected: what should have been, in the same dtypes.
        terms: the float64 reference, for the size of the terms.
        identical: the least share of 16-bit elements that are the same.
    """
    assert terms, "nothing to compare"
    same = total = 0
    for name, term in terms.items():
        got, want = actual[name], expected[name]
        assert got.dtype == want.dtype, f"{name}: {got.dtype} instead of {want.dtype}"
        assert got.shape == want.shape, f"{name}: {got.shape} instead of {want.shape}"
        assert_finite(got)
        assert_finite(want)
        error = np.abs(got.float64() - want.float64())
        if got.dtype in {"F32", "F64"}:
            allowed = 1e-6 * np.abs(want.float64()) + FLOAT32_SUM * term.magnitude
            assert (error <= allowed).all(), f"{name}: off by {error.max()}"
            continue
        distance = ulp_distance(got, want)
        wrong = (distance > 1) & ~(error <= FLOAT32_SUM * term.magnitude)
        assert not wrong.any(), f"{name}: {wrong.sum()} elements off by up to {distance.max()} ulp"
        same += int(np.count_nonzero(distance == 0))
        total += distance.size
    assert same >= identical * total, f"only {same} of {total} elements are identical"


def assert_merged_like_float64(
    actual: Mapping[str, Tensor], terms: Mapping[str, Merged], *, identical: float = 0.999
) -> None:
    """Like `assert_merged_like`, against the float64 reference rounded once."""
    rounded = {
        name: Tensor(actual[name].dtype, term.value.shape, narrow(term.value, actual[name].dtype))
        for name, term in terms.items()
    }
    assert_merged_like(actual, rounded, terms, identical=identical)


def assert_rest_untouched(
    actual: Mapping[str, Tensor], base: Mapping[str, Tensor], changed: Mapping[str, object]
) -> None:
    """The same names in both, and the same dtype, shape and bytes but for the `changed` ones."""
    assert actual.keys() == base.keys()
    different = [n for n in base if n not in changed and actual[n] != base[n]]
    assert not different, f"tensors that no adapter touches differ: {different}"
