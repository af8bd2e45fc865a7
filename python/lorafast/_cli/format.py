"""Numbers as people read them."""

from __future__ import annotations

from lorafast._words import plural

__all__ = [
    "bytes_text",
    "count_text",
    "dtype_text",
    "number_text",
    "plural",
    "seconds_text",
    "shape_text",
]


def bytes_text(count: float) -> str:
    """Return a number of bytes in decimal units, as `ls --si` and the progress bar count them."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def count_text(count: int) -> str:
    """Return a number of parameters: exact below a million, then `1.24 B`."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:,}"


def number_text(value: float) -> str:
    """Return a scale or weight in its shortest form with at most six digits."""
    return f"{value:.6g}"


def seconds_text(seconds: float) -> str:
    """Return a duration: `0.21 s`, `2 min 05 s`, `1 h 02 min`."""
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min"


def shape_text(shape: list[int]) -> str:
    """Return `1024 × 256`, or `scalar` for a tensor without dimensions."""
    return " × ".join(map(str, shape)) or "scalar"


def dtype_text(dtype: str) -> str:
    """Return the output's dtype in words."""
    return "as in the base" if dtype == "auto" else dtype
