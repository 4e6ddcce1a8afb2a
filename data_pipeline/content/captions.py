"""Captions: made clean, and chosen from what a sample offers.

A sample may bring several captions, in its `.txt` member and in fields of its `.json` member. A key
names one place: `txt`, or `json:FIELD`, whose value is a string or a list of strings.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipeline.common.errors import ConfigError, DataError

_JOINERS = "\u200c\u200d"
"""Zero-width characters that are spelling (Persian, Indic scripts, joined emoji), not rubbish."""


def clean(text: str) -> str:
    """The caption as it is stored, compared and tokenised.

    Unicode NFC, every run of white space one blank, none at the ends, and no control, formatting or
    half (surrogate) characters. `clean(clean(x)) == clean(x)`.
    """
    if text.isascii() and text.isprintable():  # nearly always: nothing to normalise, only blanks
        return " ".join(text.split())
    kept = (char for char in text if char.isspace() or not _is_rubbish(char))
    # Normalise after removing: a removed character may have kept two that compose apart.
    return " ".join(unicodedata.normalize("NFC", "".join(kept)).split())


def caption_hash(text: str) -> int:
    """A number in `[0, 2**63)` that equal captions share, whatever their capitals and blanks."""
    folded = clean(text).casefold().encode()
    return int.from_bytes(hashlib.blake2b(folded, digest_size=8).digest(), "big") >> 1


def choose(
    members: Mapping[str, bytes],
    keys: Sequence[str],
    weights: Sequence[float],
    rng: np.random.Generator | None,
) -> str | None:
    """Draw one clean caption from a sample.

    First a key is drawn by weight among those that have a caption, then one of its captions, each
    as likely as another.

    Args:
        members: The sample's files by extension, e.g. `{"txt": b"...", "json": b"..."}`.
        keys: Where captions are: `txt`, `json:FIELD`.
        weights: How often each key is used; the same length as `keys`.
        rng: The sample's own generator; None takes the first caption of the first key that has one.

    Returns:
        The caption, or None where no key has one.

    Raises:
        DataError: A member is not UTF-8 or not JSON (slug `bad-text`, `bad-json`).
    """
    offers = [
        (found, weight) for key, weight in zip(keys, weights, strict=True) if (found := find(members, key))
    ]
    if not offers:
        return None
    if rng is None:
        return offers[0][0][0]
    drawn = 0
    if len(offers) > 1:
        steps = np.cumsum([weight for _, weight in offers])
        if steps[-1] > 0:
            drawn = int(np.searchsorted(steps, rng.random() * steps[-1], side="right"))
    captions = offers[min(drawn, len(offers) - 1)][0]
    return captions[int(rng.integers(len(captions)))] if len(captions) > 1 else captions[0]


def find(members: Mapping[str, bytes], key: str) -> list[str]:
    """Every clean, non-empty caption that a sample has under `key`; see `choose`.

    Raises:
        ConfigError: `key` is neither `txt`-like nor `json:FIELD`.
        DataError: A member is not UTF-8 or not JSON (slug `bad-text`, `bad-json`).
    """
    member, colon, field = key.partition(":")
    if not member or (colon and (member != "json" or not field)):
        raise ConfigError(f"caption key {key!r} is neither a member such as 'txt' nor 'json:FIELD'")
    data = members.get(member)
    if data is None:
        return []
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"the .{member} member is not UTF-8: {error}", slug="bad-text") from error
    value: object = text
    if colon:
        value = _json_object(text).get(field)
    candidates = value if isinstance(value, list) else [value]
    cleaned = (clean(candidate) for candidate in candidates if isinstance(candidate, str))
    return [caption for caption in cleaned if caption]


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits
        raise DataError(f"the .json member is not JSON: {error}", slug="bad-json") from error
    if not isinstance(value, dict):
        raise DataError(
            f"the .json member holds a {type(value).__name__}, not an object with fields", slug="bad-json"
        )
    return value


def _is_rubbish(char: str) -> bool:
    """Control, formatting (byte-order marks, text-direction overrides) or half a surrogate pair."""
    return char not in _JOINERS and unicodedata.category(char) in ("Cc", "Cf", "Cs")
