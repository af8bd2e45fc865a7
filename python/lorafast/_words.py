"""Numbers with their nouns and verbs, and nouns with their articles: what sentences are made of.

The core has the same in `error.rs`.
"""

from __future__ import annotations


def plural(count: int, noun: str, several: str | None = None) -> str:
    """Return `1 tensor`, `2 tensors`, `2,000 bases`.

    Args:
        count: the number.
        noun: in the singular.
        several: the plural, where it is not made by an s.
    """
    return f"{count:,} {noun if count == 1 else several or noun + 's'}"


def agree(count: int, one: str, several: str) -> str:
    """Return the form of a verb or pronoun that goes with a number: `is` or `are`."""
    return one if count == 1 else several


def with_article(noun: str) -> str:
    """Return `a LOKR`, `an IA3`: with the article that it is spoken with."""
    letters = ""
    for character in noun:
        if not (character.isascii() and character.isalpha()):
            break
        letters += character
    # The letters of short abbreviations are named one by one: "aitch", "ex"; so is an X before a
    # consonant.
    is_spelled = 0 < len(letters) <= 3 and letters.isupper()
    is_x = letters[:1] in {"X", "x"} and letters[1:2].lower() not in {"", *"aeiouy"}
    vowels = "AEFHILMNORSX" if is_spelled else "AEIOaeio"
    return f"{'an' if is_x or noun[:1] in {*vowels} else 'a'} {noun}"
