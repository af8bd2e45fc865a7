"""Warnings of public names that were renamed: the old ones work for one more release."""

from __future__ import annotations


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warns that an old name is used, at the place that uses it.

    Args:
        old: what was used.
        new: what takes its place.
        stacklevel: as for `warnings.warn`, seen from the caller of this function.
    """
    import warnings

    warnings.warn(
        f"{old} is deprecated and goes away in the next release; use {new}",
        DeprecationWarning,
        stacklevel=stacklevel,
    )
