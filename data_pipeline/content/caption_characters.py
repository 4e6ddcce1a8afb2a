"""Which characters are removed from captions, by kind, and which invisible ones are kept.

Control and surrogate characters are removed, and formatting characters (category Cf) that Unicode
calls Default_Ignorable: they are invisible and do not change what a caption says. Kept are

- formatting characters that are not Default_Ignorable: Arabic and Kaithi number signs, the Syriac
  abbreviation mark (Prepended_Concatenation_Mark), interlinear annotations, joined hieroglyphs;
- joiners and the Mongolian vowel separator, which are part of the spelling of words and of emoji;
- the tags of an emoji tag sequence: without them the flags of England, Scotland and Wales are
  equal. Other tags are hidden text;
- private and unassigned characters: they are visible in some font, and a new emoji is unassigned
  in an older Unicode version.
"""

from __future__ import annotations

import re
import unicodedata

REMOVED_KINDS = {
    "control characters": "\\x00-\\x08\\x0e-\\x1b\\x7f-\\x84\\x86-\\x9f",  # the others are spaces
    "surrogates": "\\ud800-\\udfff",  # half of a character
    "byte order marks": "\\ufeff",
    "soft hyphens": "\\u00ad",  # they only show where a line may be broken
    "text directions": "\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069",  # reorder other text
    "zero-width spaces": "\\u200b\\u2060",  # they only allow or prevent a line break
    "invisible operators": "\\u2061-\\u2064\\u206a-\\u206f",  # the last: deprecated
    "notation controls": "\\U0001bca0-\\U0001bca3\\U0001d173-\\U0001d17a",  # shorthand, music
}
"""Removed characters by kind, as sets of regular expressions; tags are removed in addition."""
_TAGS_KIND = "tags outside of emoji"
_REMOVED = re.compile(f"[{''.join(REMOVED_KINDS.values())}]")
_KIND_PATTERNS = {kind: re.compile(f"[{chars}]") for kind, chars in REMOVED_KINDS.items()}
_TAGS = re.compile(
    "([\\U0001f000-\\U0001faff]\\ufe0f?[\\U000e0020-\\U000e007e]+\\U000e007f)"
    "|[\\U000e0001\\U000e0020-\\U000e007f]"
)
"""An emoji tag sequence (UTS #51), in a group, or another tag."""

_MAX_MARKS = 30
"""Maximum combining marks per letter: Unicode's stream-safe limit (UAX #15). Normalization sorts n
marks in n^2 steps, which takes five seconds for 100,000."""
_DECOMPOSING_MARKS = "\u0f73\u0f75\u0f81"
"""Tibetan vowel signs that decompose into two marks although their combining class is 0."""


def remove_characters(text: str) -> str:
    """`text` without control, surrogate and invisible formatting characters; idempotent."""
    # Tags are the second step, because a removed character may have separated them from an emoji.
    return _TAGS.sub(lambda match: match[1] or "", _REMOVED.sub("", text))


def normalize(text: str) -> str:
    """Unicode NFC with at most 30 combining marks per letter; idempotent."""
    # Marks are limited before normalization, which would be slow, and after, because some
    # characters decompose into two marks.
    return _limit_marks(unicodedata.normalize("NFC", _limit_marks(text)))


def removed_kinds(text: str) -> set[str]:
    """Kinds of the characters that cleaning removes from a caption; most captions have none."""
    if text.isascii() and text.isprintable():
        return set()
    kinds = {kind for kind, pattern in _KIND_PATTERNS.items() if pattern.search(text)}
    kept = _REMOVED.sub("", text)
    if any(not match[1] for match in _TAGS.finditer(kept)):
        kinds.add(_TAGS_KIND)
    limited = _limit_marks(kept)
    composed = unicodedata.normalize("NFC", limited)
    if limited != kept or _limit_marks(composed) != composed:
        kinds.add(f"marks beyond {_MAX_MARKS} of a letter")
    return kinds


def _limit_marks(text: str) -> str:
    """`text` with at most `_MAX_MARKS` consecutive combining marks."""
    if len(text) <= _MAX_MARKS:
        return text
    kept, num_marks = [], 0
    for char in text:
        is_mark = unicodedata.combining(char) or char in _DECOMPOSING_MARKS
        num_marks = num_marks + 1 if is_mark else 0
        if num_marks <= _MAX_MARKS:
            kept.append(char)
    return text if len(kept) == len(text) else "".join(kept)
