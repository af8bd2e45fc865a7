"""Writes docs/formats.md from the matrix: `python tests/formats/format_table.py`."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

if __name__ == "__main__":
    import sys

    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "python")]

from format_matrix import FEATURES, FORMATS, KINDS, Format, kinds_of, without

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "formats.md"
LETTERS = {"linear": "L", "conv 1x1": "1", "conv 3x3": "3", "embedding": "E", "norm": "N"}

INTRODUCTION = """\
<!-- Generated: `python tests/formats/format_table.py` writes this file from the test matrix. -->

# Adapter formats, and what each can hold

`tests/formats/test_format_matrix.py` writes an adapter of random factors for every entry of the
table, merges it into a base, and holds every tensor of the result against the formula in float64:
bases and factors in float32, float16 and bfloat16 (nine pairs an entry), rounded once. The tests
have writers of their own, and each merge is verified. Other tests hold merges against those of the
tools: PEFT ([conformance.md](conformance.md)), LyCORIS, diffusers, mlx-lm and gguf.

W is the base's weight, (out, in, kernel…); A and B are the factors, s is the scale: α/r, α/√r with
rsLoRA, MLX's `scale`, 1 where nothing says otherwise; m are DoRA's magnitudes, D a difference or a
whole weight, v a vector.

"""
CELLS = """
A letter is a kind of layer whose update is read and merged: **L** linear, **1** convolution of
1 × 1, **3** of 3 × 3, **E** embedding, **N** norm. What a dash stands for is said below.

"""
REASONS = """
## What is left out, and why

All of it is refused, and nothing is written, but for what is marked ○: no tool writes that, and it
may be read all the same.

"""


def cell(one: Format, feature: str) -> str:
    found = kinds_of(one, feature)
    return " ".join(LETTERS[kind] for kind in KINDS if kind in found) or "–"


def reasons(one: Format) -> list[str]:
    """A line for each reason of a format, with all that it is the reason for."""
    about: dict[tuple[str, bool], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for feature in FEATURES.values():
        said = kinds_of(one, feature.name)
        for kind in feature.kinds:
            if kind not in said:
                why = without(one, feature.name, kind)
                letters = about[why.reason, why.is_refused][feature.name]
                letters.append(LETTERS[kind])
    lines = []
    for (reason, is_refused), features in about.items():
        own = [
            name if not kinds_of(one, name) else f"{name} of {' '.join(letters)}"
            for name, letters in features.items()
        ]
        mark = "" if is_refused else " ○"
        lines.append(f"| `{one.name}` | {', '.join(own)}{mark} | {reason} |")
    return lines


def render() -> str:
    lines = [f"{INTRODUCTION}| Algorithm | W′ |", "|---|---|"]
    lines += [f"| {one.name} | {one.formula} |" for one in FEATURES.values()]
    head = " | ".join(["Format", *FEATURES])
    lines.append(f"{CELLS}| {head} |\n|{'---|' * (1 + len(FEATURES))}")
    for one in FORMATS:
        cells = " | ".join(cell(one, feature) for feature in FEATURES)
        lines.append(f"| `{one.name}` | {cells} |")
    lines.append("\n| Format | What it is | Spellings that are tried |\n|---|---|---|")
    for one in FORMATS:
        spellings = "; ".join(spelling.name for spelling in one.spellings)
        lines.append(f"| `{one.name}` | {one.holds} | {spellings} |")
    lines.append(f"{REASONS}| Format | What | Why |\n|---|---|---|")
    for one in FORMATS:
        lines += reasons(one)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(render())
