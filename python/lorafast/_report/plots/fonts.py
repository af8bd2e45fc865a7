"""Fonts for names in any script: which of the installed ones has a character."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Families that say they have characters and draw boxes, blanks, or others in their place.
#: Colored glyphs are pictures or layers, which matplotlib does not draw.
UNFIT = re.compile(
    r"last ?resort|adobe blank|color emoji|^cm[a-z]+10$|^stix(nonunicode|size)"
    r"|^(symbol|webdings|wingdings.*)$",
    re.IGNORECASE,
)
#: Weights and styles that stand out among the plain text around them, and letters of one width.
OUTSTANDING = re.compile(
    r"bold|black|heavy|light|thin|italic|oblique|condensed|serif|mono|kufi|nastaliq", re.IGNORECASE
)


class _Installed:
    """The installed fonts, each read once, and only until a character is found."""

    def __init__(self) -> None:
        #: For each code point of the fonts read so far the first family that has it.
        self._families: dict[int, str] = {}
        self._unread = self._read()
        self._lock = Lock()

    def family_of(self, point: int) -> str | None:
        """The first family with a code point, the plainest first; `None` where no font has it."""
        with self._lock:
            while point not in self._families:
                if next(self._unread, None) is None:
                    return None
            return self._families[point]

    def _read(self) -> Iterator[str]:
        from matplotlib import font_manager

        manager = font_manager.fontManager
        best: dict[str, tuple[float, str]] = {}
        for entry in manager.ttflist:
            # What the manager would choose for plain text of this family.
            distance = (
                manager.score_style("normal", entry.style)
                + manager.score_variant("normal", entry.variant)
                + manager.score_weight("normal", entry.weight)
                + manager.score_stretch("normal", entry.stretch)
            )
            if entry.name not in best or distance < best[entry.name][0]:
                best[entry.name] = (distance, entry.fname)
        for family in sorted(best, key=_plainest_first):
            if not UNFIT.search(family):
                self._add(best[family][1], family)
                yield family
        # matplotlib keeps a list of fonts, and does not see those that were installed after it.
        listed = {entry.fname for entry in manager.ttflist}
        others = {path for path in font_manager.findSystemFonts() if path not in listed}
        for path in sorted(others, key=_plainest_first):
            added = self._add(path)
            if added is not None:
                yield added

    def _add(self, path: str, family: str | None = None) -> str | None:
        """Notes what a font has; one that is not listed is listed where it has anything new."""
        from matplotlib import font_manager
        from matplotlib.ft2font import FT2Font

        try:
            font = FT2Font(path)
            points = font.get_charmap().keys() - self._families.keys()
            if not font.scalable or not points or UNFIT.search(font.family_name):
                return family
            if family is None:
                font_manager.fontManager.addfont(path)
                family = font_manager.fontManager.ttflist[-1].name
        except Exception:
            # Whatever a broken font raises, there are others.
            return family
        self._families.update(dict.fromkeys(points, family))
        return family


def _plainest_first(name: str) -> tuple[int, str]:
    return len(OUTSTANDING.findall(name)), name


@lru_cache(maxsize=1)
def _installed() -> _Installed:
    return _Installed()


@lru_cache(maxsize=8)
def _points_of(families: tuple[str, ...]) -> frozenset[int]:
    """The code points that the fonts of these families have."""
    from matplotlib import font_manager

    points: set[int] = set()
    for family in families:
        properties = font_manager.FontProperties(family=[family])
        points.update(font_manager.get_font(font_manager.findfont(properties)).get_charmap())
    return frozenset(points)


def families_for(text: str, families: tuple[str, ...]) -> list[str]:
    """The families to write a text in: those given, and one for each character that they lack."""
    if text.isascii():
        return list(families)
    points = _points_of(families)
    # Line breaks have no glyph.
    lacking = (ord(c) for c in text if not c.isascii() and ord(c) not in points)
    others = Counter(map(_installed().family_of, lacking))
    # The one that most of the text is in comes first, so that it is in few fonts.
    return list(families) + [family for family, _ in others.most_common() if family is not None]


def use_fonts(figure: Figure) -> None:
    """Gives each text of a figure the fonts that its characters need.

    matplotlib takes a character that a font lacks from the next family of the text's list.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if isinstance(text, Text) and not text.get_text().isascii():
            own = text.get_fontfamily()
            needed = families_for(text.get_text(), tuple(own))
            if len(needed) > len(own):
                text.set_fontfamily(needed)


def drawable(name: str) -> str:
    r"""A name as one line of characters that some font has.

    Line breaks and other controls become spaces; marks without a glyph, which join emoji or turn
    the direction of writing, are left out; a character that no installed font has is escaped as
    Python writes it, `\u6f22`.
    """
    if name.isascii() and name.isprintable():
        return name
    from matplotlib import rcParams

    points = _points_of(tuple(rcParams["font.family"]))
    return "".join(_drawable(c, points) for c in unicodedata.normalize("NFC", name))


def _drawable(character: str, points: frozenset[int]) -> str:
    category = unicodedata.category(character)
    point = ord(character)
    if category == "Cc" or category[0] == "Z":
        return " "
    if category == "Cf" or 0xFE00 <= point <= 0xFE0F or 0xE0100 <= point <= 0xE01EF:
        return ""
    if point in points or (category != "Cs" and _installed().family_of(point) is not None):
        return character
    return f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"


def width(text: str) -> int:
    """How many letters of the Latin script a text is as wide as, about."""
    if text.isascii():
        return len(text)
    return sum(
        0
        if unicodedata.category(c) in ("Mn", "Me")
        else 2
        if unicodedata.east_asian_width(c) in "WF"
        else 1
        for c in text
    )


def shorten(text: str, limit: int) -> str:
    """A text of at most a width: the middle of a longer one is left out.

    Both ends of a path tell more.
    """
    if width(text) <= limit:
        return text
    tail = (limit - 1) * 2 // 3
    end = len(text)
    while end and width(text[end - 1 :]) <= tail:
        end -= 1
    while end < len(text) and unicodedata.category(text[end])[0] == "M":
        # A mark stands on the letter before it.
        end += 1
    begin = 0
    while width(text[: begin + 1]) <= limit - 1 - tail:
        begin += 1
    return f"{text[:begin]}…{text[end:]}"
