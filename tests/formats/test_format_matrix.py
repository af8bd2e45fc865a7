"""Every entry of the table of formats: merged, and held against its formula in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lorafast
import pytest
from format_matrix import FEATURES, FORMATS, Entry, Refusal, entries, kinds_of, refusals, without
from format_table import DOCUMENT, render
from support.algorithms import ALGORITHMS, LAYERS, Array, close, generator, made
from support.files import Tensor, backdate, read_checkpoint, tensor
from support.format_writers import Layer
from support.handmade import make_base

DTYPES = ("F32", "F16", "BF16")
PAIRS = [(base, factors) for base in DTYPES for factors in DTYPES]
# Every type of either once.
FEW_PAIRS = [("F32", "F32"), ("BF16", "F16"), ("F16", "BF16")]
#: These are read as kohya's files are, but for the modules' names.
LIKE_KOHYA = {"lycoris", "diffusers", "comfyui", "onetrainer", "bfl"}


def pairs_of(number: int, entry: Entry) -> list[tuple[str, str]]:
    """The types that are tried each time: all for a feature's first entry, else one in turn."""
    in_turn = FEW_PAIRS[number % 3]
    if entry.format.name in LIKE_KOHYA and entry.feature.name not in {"LoRA", "DoRA"}:
        return [in_turn] if entry.is_first else []
    return FEW_PAIRS if entry.is_first else [in_turn]


CASES = [
    pytest.param(
        entry,
        *pair,
        id=f"{entry.id}-{'-'.join(pair)}",
        marks=[] if pair in pairs_of(number, entry) else [pytest.mark.exhaustive],
    )
    for number, entry in enumerate(entries())
    for pair in PAIRS
]


def layer_of(entry: Entry | Refusal, dtype: str) -> tuple[Layer, dict[str, Array]]:
    tensors, parts = made(entry.variant, entry.kind, dtype)
    rank = ALGORITHMS[entry.variant].rank
    layer = Layer(entry.format.modules[entry.kind], entry.kind, entry.variant, rank, tensors)
    return layer, parts


def base_of(entry: Entry | Refusal, path: Path, dtype: str) -> Path:
    weights: dict[str, Tensor] = {
        f"{module}.weight": tensor(generator(module).normal(size=LAYERS[entry.kind]), dtype)
        for module in entry.format.modules[entry.kind]
    }
    base = make_base(path, modules={}, dtype=dtype, others=weights, config=entry.format.config)
    return backdate(base)


@pytest.mark.parametrize(("entry", "base_dtype", "dtype"), CASES)
def test_a_merge_is_the_formula(entry: Entry, base_dtype: str, dtype: str, tmp_path: Path) -> None:
    layer, parts = layer_of(entry, dtype)
    base = base_of(entry, tmp_path / "base", base_dtype)
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapter = backdate(entry.spelling.write(folder, layer))
    listing = lorafast.inspect(adapter)
    assert isinstance(listing, lorafast.AdapterListing)
    assert listing.format == entry.format.name
    lorafast.merge(base, adapter, tmp_path / "out")
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    changed = {f"{module}.weight" for module in layer.modules}
    for name, value in before.items():
        if name not in changed:
            assert after[name] == value, name
            continue
        weight = value.float64()
        expected = entry.merged(parts, weight)
        close(after[name], expected, weight)
    assert lorafast.verify(base, adapter, backdate(tmp_path / "out")).ok
    uses = {use.use for use in listing.tensors_use}
    assert uses == {"used"}


@pytest.mark.parametrize("refusal", [pytest.param(one, id=one.id) for one in refusals()])
def test_what_a_format_cannot_say_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    layer, _ = layer_of(refusal, "F32")
    if (
        "lora, no alpha" in refusal.format.says["LoRA"]
        and "lora" not in refusal.format.says["LoRA"]
    ):
        # An alpha would be refused by itself.
        layer = replace(layer, parts=layer.weights())
    base = base_of(refusal, tmp_path / "base", "F32")
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapter = backdate(refusal.format.spellings[0].write(folder, layer))
    with pytest.raises(lorafast.LorafastError) as raised:
        lorafast.merge(base, adapter, tmp_path / "out")
    assert str(folder) in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_every_combination_is_said_or_has_its_reason() -> None:
    for one in FORMATS:
        for feature in FEATURES.values():
            for kind in set(feature.kinds) - kinds_of(one, feature.name):
                assert without(one, feature.name, kind).reason


def test_the_document_is_current() -> None:
    assert DOCUMENT.read_text() == render(), "run: python tests/formats/format_table.py"


def test_every_format_is_in_the_table() -> None:
    with pytest.raises(ValueError, match="is none of") as raised:
        lorafast.inspect(Path(__file__), format="none")
    known = str(raised.value).partition("is none of ")[2].split(", ")
    assert sorted(one.name for one in FORMATS) == sorted(known)
