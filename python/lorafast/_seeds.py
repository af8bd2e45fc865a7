"""Seeds of random masks and vectors, as users give them."""

from __future__ import annotations

import operator


def checked_seed(seed: object) -> int:
    """The seed as the core takes it.

    Args:
        seed: what was given: a whole number of any type that counts as one, such as NumPy's.

    Raises:
        TypeError: it is no whole number.
        ValueError: it does not fit in 64 bits without a sign.
    """
    wanted = "it is a whole number from 0 to 2**64 - 1"
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed is {seed!r}; {wanted}")
    number = operator.index(seed)
    if not 0 <= number < 1 << 64:
        raise ValueError(f"seed is {number}; {wanted}")
    return number
