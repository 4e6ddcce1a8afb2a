"""The writing system of a text, from the Unicode names of its letters.

A coarse indicator of language: it separates Russian from Japanese, but not English from German.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache

_MAX_CHARACTERS = 1000
_SCRIPT_NAMES = {"CJK": "Han", "KANGXI": "Han"}
_MANY_CHARACTER_SCRIPTS = ("Han", "Hiragana", "Katakana", "Hangul")
_VARIANT_PREFIXES = (
    "FULLWIDTH",
    "HALFWIDTH",
    "MODIFIER",
    "SUBSCRIPT",
    "SUPERSCRIPT",
    "MATHEMATICAL",
    "DOUBLE-STRUCK",
)


def script_of(text: str) -> str:
    """The script of most letters: `Latin`, `Han`, `Cyrillic`, ...

    `Japanese` for kana with or without Han characters; `none` if there is no letter.
    """
    counts = Counter(script for char in text[:_MAX_CHARACTERS] if (script := _script(char)))
    kana = counts["Hiragana"] + counts["Katakana"]
    if kana and 10 * kana >= counts.total():
        return "Japanese"
    return min(counts, key=lambda script: (-counts[script], script), default="none")


def many_character_ratio(texts: Iterable[str]) -> float:
    """Ratio of letters in scripts with thousands of characters: Han, kana, Hangul; 0 to 1."""
    characters: Counter[str] = Counter()
    for text in texts:
        characters.update(text)
    counts: Counter[str] = Counter()
    for char, count in characters.items():
        counts[_script(char)] += count
    del counts[""]
    return sum(counts[script] for script in _MANY_CHARACTER_SCRIPTS) / max(1, counts.total())


@cache
def _script(char: str) -> str:
    """The script of one character; empty if it is not a letter."""
    if unicodedata.category(char)[0] != "L":
        return ""
    words = unicodedata.name(char, "").split()
    first = next((word for word in words if word not in _VARIANT_PREFIXES), "")
    return _SCRIPT_NAMES.get(first, first.capitalize()) if first else "other"
