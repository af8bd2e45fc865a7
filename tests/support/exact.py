"""Merged weights as real numbers, in whole numbers of any length, rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.files import Tensor

#: Bits of a significand, and the exponent of the smallest positive number.
FORMATS = {"BF16": (8, -133), "F16": (11, -24), "F32": (24, -149), "F64": (53, -1074)}


def rounded(value: Fraction, dtype: str) -> float:
    """To nearest even. A zero is +0; what is beyond the largest number is infinite."""
    precision, smallest = FORMATS[dtype]
    if value == 0:
        return 0.0
    magnitude = abs(value)
    # The exponent of the first digit.
    top = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** top > magnitude:
        top -= 1
    last = max(top - precision + 1, smallest)
    # Python rounds fractions to nearest even.
    digits = round(magnitude / Fraction(2) ** last)
    largest_top = {"BF16": 127, "F16": 15, "F32": 127, "F64": 1023}[dtype]
    if digits * Fraction(2) ** last >= Fraction(2) ** (largest_top + 1):
        result = float("inf")
    else:
        result = float(digits * Fraction(2) ** last)
    return -result if value < 0 else result


def merged(
    weight: Tensor,
    products: Sequence[tuple[NDArray[Any], NDArray[Any], float, float]],
    dtype: str,
    replaced: Sequence[tuple[float, Tensor]] = (),
) -> NDArray[np.float64]:
    """W + Σ s·w·(left · right) + Σ w·(S - W), rounded once.

    Args:
        weight: W.
        products: left (rows, rank), right (rank, columns), s and w.
        dtype: what is written.
        replaced: w and S.
    """
    rows = weight.float64().reshape(weight.shape[0], -1)
    result = np.empty(rows.shape)
    others = [(Fraction(share), each.float64().reshape(rows.shape)) for share, each in replaced]
    factors = [
        (
            [[Fraction(float(value)) for value in line] for line in left],
            [[Fraction(float(value)) for value in line] for line in right.T],
            Fraction(scale) * Fraction(share),
        )
        for left, right, scale, share in products
    ]
    for row, line in enumerate(rows):
        for column, value in enumerate(line):
            total = start = Fraction(float(value))
            for left, right, factor in factors:
                pairs = zip(left[row], right[column], strict=True)
                total += factor * sum((a * b for a, b in pairs), Fraction(0))
            for share, other in others:
                total += share * (Fraction(float(other[row, column])) - start)
            result[row, column] = rounded(total, dtype)
    return result.reshape(weight.shape)
