"""In which script a text is written, from the names that Unicode gives to its letters.

That is a first look at languages: it tells Russian from Japanese, not English from German.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import cache

_FIRST_CHARACTERS = 1000
_NAMES = {"CJK": "Han", "KANGXI": "Han"}
_FORMS = (
    "FULLWIDTH",
    "HALFWIDTH",
    "MODIFIER",
    "SUBSCRIPT",
    "SUPERSCRIPT",
    "MATHEMATICAL",
    "DOUBLE-STRUCK",
)


def script_of(text: str) -> str:
    """The script of most letters: `Latin`, `Han`, `Cyrillic`, ...; `Japanese` for kana with or
    without Han.

    `none` if there is no letter.
    """
    counts = Counter(script for char in text[:_FIRST_CHARACTERS] if (script := _script(char)))
    kana = counts["Hiragana"] + counts["Katakana"]
    if kana and 10 * kana >= counts.total():
        return "Japanese"
    return min(counts, key=lambda script: (-counts[script], script), default="none")


@cache
def _script(char: str) -> str:
    """Of one character; empty for what is no letter."""
    if unicodedata.category(char)[0] != "L":
        return ""
    words = unicodedata.name(char, "").split()
    first = next((word for word in words if word not in _FORMS), "")
    return _NAMES.get(first, first.capitalize()) if first else "other"
