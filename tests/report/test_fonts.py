"""Names in any script in pictures: fonts that have their characters, or escapes where none has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lorafast._report.plots import fonts, style
from support import records

#: Characters that DejaVu, which matplotlib brings, lacks.
HAN, HANGUL, THAI = "适配器", "어댑터", "ปรับ"

MakeFont = Callable[[str, str], Path]


@pytest.fixture
def make_font(tmp_path: Path) -> MakeFont:
    """Writes a font of a family with a square for each of some characters."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    def make(family: str, characters: str) -> Path:
        pen = TTGlyphPen(None)
        pen.moveTo((100, 0))
        for corner in ((900, 0), (900, 800), (100, 800)):
            pen.lineTo(corner)
        pen.closePath()
        square = pen.glyph()
        points = {ord(character): f"u{ord(character):04x}" for character in characters}
        names = [".notdef", *points.values()]
        builder = FontBuilder(1000, isTTF=True)
        builder.setupGlyphOrder(names)
        builder.setupCharacterMap(points)
        builder.setupGlyf(dict.fromkeys(names, square))
        builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
        builder.setupHorizontalHeader(ascent=900, descent=-200)
        builder.setupNameTable({"familyName": family, "styleName": "Regular"})
        builder.setupOS2()
        builder.setupPost()
        path = tmp_path / f"{family.replace(' ', '')}-Regular.ttf"
        builder.save(path)
        return path

    return make


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Leaves of the machine's fonts DejaVu alone, and adds others: listed by matplotlib, or not."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    before = [entry for entry in manager.ttflist if entry.name.startswith("DejaVu")]

    def add(listed: tuple[Path, ...] = (), unlisted: tuple[Path, ...] = ()) -> None:
        monkeypatch.setattr(manager, "ttflist", list(before))
        for path in listed:
            manager.addfont(path)
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(map(str, unlisted)))
        fonts._installed.cache_clear()

    yield add
    monkeypatch.undo()
    fonts._installed.cache_clear()
    manager._findfont_cached.cache_clear()


def texts(figure: Any) -> dict[str, list[str]]:
    """Every text of a figure with its families."""
    from matplotlib.text import Text

    figure.canvas.draw()
    return {text.get_text(): list(text.get_fontfamily()) for text in figure.findobj(Text)}


def comparison_of(*names: str) -> Any:
    return records.comparison([records.analysis(name=name, seed=i) for i, name in enumerate(names)])


@pytest.mark.parametrize("is_listed", [True, False])
def test_a_name_is_drawn_in_a_font_that_has_its_characters(
    make_font: MakeFont, install: Callable[..., None], is_listed: bool
) -> None:
    path = make_font("Test Han", HAN)
    install(**{"listed" if is_listed else "unlisted": (path,)})
    comparison = comparison_of(f"run {HAN}", "plain")
    for kind in ("cosine", "distributions", "adapters"):
        drawn = texts(comparison.plot(kind))
        assert drawn[f"run {HAN}"] == ["sans-serif", "Test Han"], kind
        assert drawn["plain"] == ["sans-serif"], kind
    title = texts(comparison.analyses[0].plot("weights"))
    assert title[f"run {HAN}: stored weights"] == ["sans-serif", "Test Han"]


def test_a_name_in_several_scripts_has_a_font_for_each(
    make_font: MakeFont, install: Callable[..., None]
) -> None:
    listed = (make_font("Test A", HANGUL + HAN[:1]), make_font("Test B", HAN))
    install(listed=listed, unlisted=(make_font("Test C", THAI),))
    name = f"{HAN}{HANGUL[:1]} {THAI}"
    (families,) = (own for text, own in texts(comparison_of(name, "b").plot("cosine")).items()
                   if text == name)  # fmt: skip
    assert families[0] == "sans-serif"
    assert sorted(families[1:]) == ["Test A", "Test B", "Test C"]


def test_modules_have_fonts_too(make_font: MakeFont, install: Callable[..., None]) -> None:
    install(listed=(make_font("Test Han", HAN),))
    analysis = records.analysis({f"block.{i}.{HAN}": (i, f"{HAN}_proj") for i in range(12)})
    for kind in ("heatmap", "spectrum", "layers"):
        drawn = texts(analysis.plot(kind))
        found = [families for text, families in drawn.items() if HAN in text]
        assert found, kind
        assert all(families == ["sans-serif", "Test Han"] for families in found), kind


def test_what_no_font_has_is_escaped(
    install: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    install()
    with caplog.at_level(logging.WARNING):
        drawn = texts(comparison_of("适 é", "配 é", "\U0001f680").plot("cosine"))
    assert {"\\u9002 é", "\\u914d é", "\\U0001f680"} <= drawn.keys()
    assert not caplog.records


def test_fonts_are_read_for_names_that_need_them_alone(
    monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]
) -> None:
    install()

    def read(*_: Any) -> Any:
        raise AssertionError("a font is looked for")

    monkeypatch.setattr(fonts._Installed, "family_of", read)
    comparison_of("plain-name", "größer", "имя").plot("cosine")
    records.analysis().plot("overview")


def test_a_broken_font_is_passed_over(
    make_font: MakeFont, install: Callable[..., None], tmp_path: Path
) -> None:
    broken = tmp_path / "A-Regular.ttf"
    broken.write_bytes(b"\0\1\0\0no font")
    install(unlisted=(broken, tmp_path / "missing.ttf", make_font("Test Han", HAN)))
    assert style.truncate(HAN) == HAN


@pytest.mark.parametrize("family", ["Last Resort High-Efficiency", "Adobe Blank", "My Color Emoji"])
def test_a_font_that_draws_something_else_is_none(
    make_font: MakeFont, install: Callable[..., None], family: str
) -> None:
    path = make_font(family, HAN)
    install(listed=(path,))
    assert style.truncate(HAN) == "\\u9002\\u914d\\u5668"
    install(unlisted=(path,))
    assert style.truncate(HAN) == "\\u9002\\u914d\\u5668"


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("a\nb\tc\x07d", "a b c d"),
        ("a\u2028b", "a b"),
        # A mark that would turn the rest of the line around.
        ("a\u202egnp", "agnp"),
        ("x\ufe0fy\u200dz", "xyz"),
        # A byte of a file name that is no UTF-8.
        ("run-\udcff", "run-\\udcff"),
        # As file names are stored on a Mac: a letter and its accent apart.
        ("e\u0301", "é"),
        ("", ""),
    ],
)
def test_a_name_is_one_line_of_visible_characters(
    install: Callable[..., None], name: str, label: str
) -> None:
    install()
    assert style.truncate(name) == label


def test_wide_characters_count_twice(make_font: MakeFont, install: Callable[..., None]) -> None:
    install(listed=(make_font("Test Han", HAN),))
    assert style.truncate(HAN * 3, 18) == HAN * 3
    shortened = style.truncate(HAN * 20, 18)
    assert len(shortened) <= 9
    assert fonts.width(shortened) <= 18
    assert style.truncate("x" * 60, 18).count("x") == 17
