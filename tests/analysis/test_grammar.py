"""The sentences of findings and notes, about one thing and about two."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._analysis.findings import KINDS
from lorafast._fleet.findings import KINDS as FLEET_KINDS
from lorafast._words import agree, plural, with_article
from support.analysis import graded_factors, random_factors, write_factors
from support.files import tensor
from support.handmade import make_adapter, make_base
from support.reference import PREFIX

SHAPES = {f"model.layers.{block}.q": (40, 30, 8) for block in range(6)}
PATHS = list(SHAPES)

#: A number, a noun, perhaps what follows it in parentheses, and the verb.
SUBJECT = re.compile(
    r"(?<![\w.,-])(?<!of )([\d,]+) (?!of )([a-z]+)\b(?: of [a-z]+)?(?: \([^)]*\))? "
    r"(is|are|has|have|was|were|does|do|holds|hold|lacks|lack)\b"
)
#: The same where the number is one part of another.
PART = re.compile(
    r"(?<![\w.,-])([\d,]+) of [\d,]+ [a-z]+s?(?: of [\w.]+)? "
    r"(is|are|has|have|holds|hold|lacks|lack)\b"
)
SINGULAR = {"is", "has", "was", "does", "holds", "lacks"}
ONE_OF_MANY = re.compile(
    r"(?<![\w.,-])1 (adapters|modules|tensors|values|rows|parameters|directions|bases|files)\b"
)
MANY_OF_ONE = re.compile(
    r"(?<![\w.,-])(?:[2-9]|\d{2,}) (adapter|module|tensor|value|row|parameter|direction|base)\b"
)
ARTICLE = re.compile(r"\ba (?!and\b)([aeioAEIO]\w*)|\ban ([^aeiouAEFHILMNORSX\W]\w*)")


def faults(text: str) -> list[str]:
    """What is wrong with a sentence's numbers, verbs and articles."""
    found = [match.group() for match in ONE_OF_MANY.finditer(text)]
    found += [match.group() for match in MANY_OF_ONE.finditer(text)]
    found += [match.group() for match in ARTICLE.finditer(text)]
    for match in SUBJECT.finditer(text):
        if (match[1] == "1") is not (match[3] in SINGULAR):
            found.append(match.group())
    for match in PART.finditer(text):
        if (match[1] == "1") is not (match[2] in SINGULAR):
            found.append(match.group())
    return found


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("1 adapter are zero", True),
        ("1 adapter (c) are zero", True),
        ("2 adapters (c, d) is zero", True),
        ("1 modules have a bias", True),
        ("1 of 320 values of q.lora_B are NaN", True),
        ("it is a IA3 adapter", True),
        ("an LOKR adapter, an magnitude", True),
        ("1 adapter (c) is zero", False),
        ("2 adapters (c, d) are zero; 1 of 320 values of q.lora_B is NaN", False),
        ("an IA3 adapter; a LOKR one; 0.1 of the norm", False),
    ],
)
def test_the_rules_of_this_test(text: str, wrong: bool) -> None:
    assert bool(faults(text)) is wrong, faults(text)


def ordinary(count: int = 6) -> dict[str, Any]:
    sigma = np.geomspace(1.0, 0.25, 8)
    return {path: graded_factors(40, 30, sigma, seed=at) for at, path in enumerate(PATHS[:count])}


Plant = Callable[[Path, int], Iterator[str]]


def of_adapter(change: Callable[[dict[str, Any], int], dict[str, Any] | None]) -> Plant:
    """The findings of an ordinary adapter in which a number of modules are changed."""

    def plant(folder: Path, count: int) -> Iterator[str]:
        factors = ordinary()
        settings = change(factors, count) or {}
        base = settings.pop("base", None)
        base = None if base is None else base(folder)
        path = write_factors(folder / "adapter", factors, **settings)
        for finding in lorafast.analyze(path, base=base).findings:
            yield f"{finding.kind}|{finding.reason}"
        for item in lorafast.scan(path).findings:
            yield f"{item.finding.kind}|{item.finding.reason}"

    return plant


def scale(factor: float) -> Plant:
    def change(factors: dict[str, Any], count: int) -> None:
        for path in PATHS[:count]:
            b, a = factors[path]
            factors[path] = (b * factor, a)

    return of_adapter(change)


def not_finite(factors: dict[str, Any], count: int) -> None:
    factors[PATHS[0]][0].flat[:count] = math.nan


def keep(factors: dict[str, Any], count: int) -> None:
    for path in PATHS[count:]:
        del factors[path]


def untrained(factors: dict[str, Any], count: int) -> None:
    keep(factors, count)
    factors.update({path: (0 * b, a) for path, (b, a) in factors.items()})


def alphas(alpha: float, *, whole: bool) -> Plant:
    def change(factors: dict[str, Any], count: int) -> dict[str, Any]:
        if whole:
            keep(factors, count)
            return {"alpha": alpha}
        patterns = {re.escape(path): alpha for path in PATHS[:count]}
        return {"alpha_pattern": patterns, "rank_pattern": {}, "r": 8, "lora_alpha": 8}

    return of_adapter(change)


def ranks(factors: dict[str, Any], count: int) -> None:
    factors.update(random_factors(dict.fromkeys(PATHS[:count], (12, 9, 600))))


def spectra(sigma: list[float]) -> Plant:
    def change(factors: dict[str, Any], count: int) -> None:
        for path in PATHS[:count]:
            factors[path] = graded_factors(40, 30, np.array(sigma))

    return of_adapter(change)


def overwhelming(factors: dict[str, Any], count: int) -> dict[str, Any]:
    keep(factors, count)
    modules = dict.fromkeys(PATHS, (40, 30))
    return {"base": lambda folder: make_base(folder / "base", modules=modules, scale=1e-3)}


def beside(kind: str) -> Plant:
    def change(factors: dict[str, Any], count: int) -> dict[str, Any]:
        keep(factors, count)
        rows = {
            "magnitude": (lambda path: f"{PREFIX}{path}.lora_magnitude_vector", {"use_dora": True}),
            "bias": (lambda path: f"{PREFIX}{path}.lora_B.bias", {"lora_bias": True}),
        }
        if kind in rows:
            name, settings = rows[kind]
            others = {name(path): tensor(np.ones(40)) for path in PATHS[:count]}
            return {"others": others, **settings}
        if kind == "saved":
            names = ["score", "head"][:count]
            others = {f"{PREFIX}{name}.weight": tensor(np.ones((3, 4))) for name in names}
            return {"others": others, "modules_to_save": names}
        delta = f"{PREFIX}embed.token_adapter.trainable_tokens_delta"
        return {
            "others": {delta: tensor(np.ones((count, 16)))},
            "trainable_token_indices": list(range(count)),
        }

    return of_adapter(change)


def saved_alone(folder: Path, count: int) -> Iterator[str]:
    names = ["score", "head"][:count]
    tensors = {f"{PREFIX}{name}.weight": tensor(np.ones((3, 4))) for name in names}
    path = make_adapter(folder / "adapter", tensors, modules_to_save=names)
    for finding in lorafast.analyze(path).findings:
        yield f"{finding.kind}|{finding.reason}"


def compared(folder: Path, count: int) -> Iterator[str]:
    one = ordinary()
    other = {path: (-b, a) for path, (b, a) in ordinary(6 - count).items()}
    clash = {path: random_factors({path: (20, 30, 8)})[path] for path in PATHS[:count]}
    paths = [
        write_factors(folder / name, factors)
        for name, factors in (("a", one), ("b", dict(one)), ("c", other), ("d", clash))
    ]
    whole = {path: (-b, a) for path, (b, a) in one.items()}
    paths.append(write_factors(folder / "e", whole))
    for finding in lorafast.compare(paths).findings:
        yield f"{finding.kind}|{finding.reason}"


def fleet(folder: Path, count: int) -> Iterator[str]:
    for at in range(6):
        factors = random_factors(SHAPES, at)
        scaled = {p: (b * (1000 if at < count else 1), a) for p, (b, a) in factors.items()}
        base = f"base-{at % (count + 1)}" if at > 20 else "base"
        write_factors(folder / f"a{at}", scaled, base_model_name_or_path=base)
    for at in range(count + 1):
        write_factors(folder / f"same{at}", random_factors(SHAPES, 50))
        write_factors(folder / f"other{at}", random_factors(SHAPES, at + 60),
                      base_model_name_or_path=f"other-{at}")  # fmt: skip
    for at in range(count):
        make_adapter(folder / f"ia3-{at}", peft_type="OFT")
    found = lorafast.scan(folder)
    for item in found.findings:
        yield f"{item.finding.kind}|{item.finding.reason}"
    for error in found.errors:
        yield f"error|{error.reason}"


def alike(folder: Path, count: int) -> Iterator[str]:
    write_factors(folder / "a", random_factors(SHAPES, 1))
    write_factors(folder / "b", random_factors(SHAPES, 2))
    for at in range(count):
        factors = random_factors(SHAPES, 10 + at)
        write_factors(folder / f"zero{at}", {p: (0 * b, a) for p, (b, a) in factors.items()})
        broken = {p: (b.copy(), a) for p, (b, a) in factors.items()}
        broken[PATHS[0]][0][0, 0] = math.inf
        write_factors(folder / f"odd{at}", broken)
        few = {path: factors[path] for path in PATHS[:3]}
        write_factors(folder / f"few{at}", few, base_model_name_or_path=None)
        others = {f"{PREFIX}{path}.lora_B.bias": tensor(np.ones(40)) for path in PATHS}
        write_factors(folder / f"bias{at}", factors, others=others, lora_bias=True)
    yield from (f"similarity|{note}" for note in lorafast.similarity(folder).notes)
    yield from (f"duplicates|{note}" for note in lorafast.duplicates(folder).notes)


PLANTS: dict[str, Plant] = {
    "non_finite": of_adapter(not_finite),
    "untrained": of_adapter(untrained),
    "zero_scale": alphas(0.0, whole=False),
    "zero_scale, whole": alphas(0.0, whole=True),
    "zero_update": scale(0.0),
    "dead_module": scale(1e-6),
    "unusual_scale": alphas(400.0, whole=False),
    "unusual_scale, whole": alphas(-400.0, whole=True),
    "unusual_rank": of_adapter(ranks),
    "spectral_outlier": scale(50.0),
    "dominant_module": scale(5.0),
    "overwhelming_update": of_adapter(overwhelming),
    "unused_rank": spectra([1.0, 1e-3, *[1e-4] * 6]),
    "unused_rank, of two": spectra([1.0, 0.5, *[1e-4] * 6]),
    "exhausted_rank": spectra([0.6] * 8),
    "feature: magnitude": beside("magnitude"),
    "feature: bias": beside("bias"),
    "feature: saved": beside("saved"),
    "feature: rows": beside("rows"),
    "no_modules": saved_alone,
    "compare": compared,
    "fleet": fleet,
    "similarity": alike,
}


@pytest.mark.parametrize("name", PLANTS)
@pytest.mark.parametrize("count", [1, 2])
def test_sentences_agree_with_their_numbers(tmp_path: Path, name: str, count: int) -> None:
    told = list(PLANTS[name](tmp_path, count))
    # Of two modules none carries most of the norm.
    assert told or (name, count) == ("dominant_module", 2)
    kinds = {each.partition("|")[0] for each in told}
    expected = name.partition(",")[0].partition(":")[0]
    if expected in KINDS:
        assert expected in kinds or not told
    for each in told:
        assert faults(each.partition("|")[2]) == [], each


def test_every_kind_of_finding_is_tried(tmp_path: Path) -> None:
    kinds = set()
    for at, plant in enumerate(PLANTS.values()):
        kinds |= {each.partition("|")[0] for each in plant(tmp_path / str(at), 1)}
    assert set(FLEET_KINDS) | set(KINDS) <= kinds


@pytest.mark.parametrize(
    ("noun", "article"),
    [
        *(("IA3", "an"), ("ADALORA", "an"), ("OFT", "an"), ("LN_TUNING", "an"), ("HRA", "an")),
        *(
            ("XLORA", "an"),
            ("LOKR", "a"),
            ("LOHA", "a"),
            ("VERA", "a"),
            ("BOFT", "a"),
            ("C3A", "a"),
        ),
        *(("FOURIERFT", "a"), ("P_TUNING", "a"), ("RANDLORA", "a"), ("U8", "a"), ("F16", "an")),
        *(("adapter", "an"), ("module", "a"), ("AffineTensor", "an"), ("", "a")),
    ],
)
def test_articles_are_as_words_are_spoken(noun: str, article: str) -> None:
    assert with_article(noun) == f"{article} {noun}"


def test_numbers_with_nouns_and_verbs() -> None:
    assert [plural(n, "tensor") for n in (0, 1, 2, 2000)] == [
        *("0 tensors", "1 tensor", "2 tensors", "2,000 tensors"),
    ]
    assert plural(2, "matrix", "matrices") == "2 matrices"
    assert [agree(n, "is", "are") for n in (0, 1, 2)] == ["are", "is", "are"]
