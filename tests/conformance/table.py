"""Writes docs/conformance.md from the matrix: `python tests/conformance/table.py`."""

from __future__ import annotations

from pathlib import Path

from architectures import CASES, MORE_CASES
from matrix import FEATURES, REFUSALS, Entry, Feature

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"
BASES = {
    "layers": "one layer of each kind",
    "experts": "experts",
    "transposed-experts": "experts stored (in, out)",
    "llama": "Llama",
    "tied-llama": "Llama with a tied head",
    "gpt2": "GPT-2",
    "bert-classifier": "BERT",
    "vit-classifier": "ViT",
}

INTRODUCTION = """\
<!-- Generated: `python tests/conformance/table.py` writes this file from the test matrix. -->

# What PEFT writes, and what a merge makes of it

Each entry below is an adapter that PEFT 0.21.2 makes; noise is then added to every one of its
tensors. `tests/conformance` merges it with PEFT (load, then `merge_and_unload()`) and with
lorafast from the same files, on bases in float32, bfloat16 and float16 with adapters in each of the
three (nine pairs an entry), and compares every tensor of the two results by name, shape and value.
Every result is also compared with the same merge in float64, rounded once.
The torch backend merges every entry as well, as files and into loaded modules, on the CPU; files
also on a GPU where there is one, and a share of them on a simulated CUDA device that checks the
order of every access.

- **same**: float32 to 10⁻⁶ relative to the size of the terms; 16-bit to 1 ulp.
- **nearer**: PEFT rounds 16-bit weights more than once, lorafast once. The two lie no further apart
  than those roundings explain, and lorafast's is the nearer one to the float64 result.
- **exact**: PEFT's own merge raises an error; the float64 result alone is compared with.

W is the base's weight, (out, in); A (r, in) and B (out, r) are the factors, s is α/r, b a bias, m
DoRA's magnitude.
"""

REFUSED = """
## What is refused

A merge names the feature, writes nothing, and says why. Each line is an adapter that PEFT made, or
a config that names the feature.

"""


ARCHITECTURES = """
## Architectures

Small models of each kind, as transformers saves them. Where it renames or stacks what it loads, an
adapter is named after the model in memory and the base after its files; the entries are adapters of
the current release's modules, merged into the files that it writes, and the verdict is **same** or,
for experts, **nearer**. Adapters of earlier releases and bases that are stored as in memory are
merged as well and give the same numbers.

"""


def verdict(feature: Feature) -> str:
    if feature.peft_fails:
        return "exact"
    return "same" if feature.roundings == 1 else "nearer"


def describe(entry: Entry) -> str:
    base = f" ({BASES[entry.base]})" if entry.base != "layers" else ""
    return entry.name + base


def render() -> str:
    lines = [INTRODUCTION, "| Feature | Formula | Entries | Verdict |", "|---|---|---|---|"]
    for feature in FEATURES:
        entries = "; ".join(describe(entry) for entry in feature.entries)
        lines.append(f"| {feature.name} | {feature.formula} | {entries} | {verdict(feature)} |")
    lines.append(f"{ARCHITECTURES}| Model | Entries |\n|---|---|")
    models = (CASES | MORE_CASES).items()
    lines.extend(f"| {kind.replace('_', ' ')} | {'; '.join(cases)} |" for kind, cases in models)
    lines.append(f"{REFUSED}| Feature | The message names |\n|---|---|")
    lines.extend(f"| {refusal.name} | `{refusal.says}` |" for refusal in REFUSALS)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(render())
