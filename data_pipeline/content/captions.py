"""Captions: made clean, and chosen from what a sample offers.

A sample may bring several captions, in its `.txt` member and in fields of its `.json` member. A key
names one place: `txt`, or `json:FIELD`, whose value is a string or a list of strings. Only members
with the names of text are looked into; any other is never opened, whatever the settings say.
"""

from __future__ import annotations

import hashlib
import itertools
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.fields import look_up, parse_fields
from data_pipeline.settings import LimitConfig

TEXT_EXTENSIONS = frozenset(("txt", "text", "caption"))
"""Members that may hold a caption, by the last part of their extension."""

_JOINERS = "\u200c\u200d"
"""Zero-width characters that are spelling (Persian, Indic scripts, joined emoji), not rubbish."""
_MOST_MARKS = 30
"""Accents on one letter; Unicode's "stream-safe" limit (UAX #15). What goes beyond is made to break
programs: putting n accents in order takes n^2 steps, five seconds for 100,000."""
_HIDDEN_MARKS = "\u0f73\u0f75\u0f81"
"""Tibetan letters that come apart into two accents, though they do not count as one."""
_LIMITS = LimitConfig()


def clean(text: str) -> str:
    """The caption as it is stored, compared and tokenized.

    Unicode NFC, every run of white space one blank, none at the ends, no control, formatting or
    half (surrogate) characters, and at most 30 accents on a letter. `clean(clean(x)) == clean(x)`.
    """
    # All that is rubbish counts as unprintable, and so does all white space but the blank.
    if not text.isprintable():
        text = "".join(char for char in text if char.isspace() or not _is_rubbish(char))
    if not text.isascii():
        # Normalized after removing: a removed character may have kept two that compose apart.
        # Limited before, for the time it takes, and after, as some characters come apart into two
        # accents.
        text = _limit_marks(unicodedata.normalize("NFC", _limit_marks(text)))
    return " ".join(text.split())


def caption_hash(text: str) -> int:
    """A number in `[0, 2**63)` that equal captions share, whatever their capitals and blanks."""
    return clean_hash(clean(text))


def clean_hash(caption: str) -> int:
    """`caption_hash` of a caption that is clean."""
    folded = caption.casefold().encode()
    return int.from_bytes(hashlib.blake2b(folded, digest_size=8).digest(), "big") >> 1


def check_key(key: str) -> None:
    """Refuse a caption key that names no place where captions may be.

    Raises:
        ConfigError: `key` is neither a member of text such as `txt` nor `json:FIELD`.
    """
    member, colon, field = key.partition(":")
    if (member, colon) == ("json", ":") and field:
        return
    if colon or member.rpartition(".")[2] not in TEXT_EXTENSIONS:
        known = ", ".join(sorted(TEXT_EXTENSIONS))
        raise ConfigError(
            f"caption key {key!r} is neither a member of text ({known}, or one that ends so, such as "
            f"'en.txt') nor 'json:FIELD'; see data.caption_keys"
        )


class Texts:
    """The texts of one sample: each member is decoded, parsed and cleaned at most once."""

    def __init__(self, members: Mapping[str, bytes], limits: LimitConfig = _LIMITS) -> None:
        """Know the members; nothing is looked at yet.

        Args:
            members: The sample's files by extension, e.g. `{"txt": b"...", "json": b"..."}`.
            limits: How long a text and how deep a JSON member may be.
        """
        self._members, self._limits = members, limits
        self._found: dict[str, list[str]] = {}
        self._fields: dict[str, object] | None = None

    def fields(self) -> dict[str, object]:
        """The fields of the `.json` member; none if there is no such member.

        Raises:
            DataError: It is not JSON, or goes beyond a limit (slug `bad-json`).
        """
        if self._fields is None:
            data = self._members.get("json")
            self._fields = {} if data is None else parse_fields(data, self._limits.json_depth)
        return self._fields

    def find(self, key: str) -> list[str]:
        """Every clean, non-empty caption under `key`; see `find`."""
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._find(key)
        return found

    def _find(self, key: str) -> list[str]:
        check_key(key)
        member, colon, field = key.partition(":")
        if colon:
            value = look_up(self.fields(), (field,))
            texts = value if isinstance(value, list) else [value]
        else:
            data = self._members.get(member)
            if data is None:
                return []
            texts = [self._decode(member, data)]
        return [
            caption for text in texts if isinstance(text, str) and (caption := self._clean(text))
        ]

    def _decode(self, member: str, data: bytes) -> str:
        # A character takes four bytes at most: beyond that there is no need to decode.
        if len(data) > 4 * self._limits.caption_chars:
            raise self._too_long(f"at least {len(data) // 4:,}")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"the .{member} member is not UTF-8: {error}", slug="bad-text"
            ) from error

    def _clean(self, text: str) -> str:
        if len(text) > self._limits.caption_chars:
            raise self._too_long(f"{len(text):,}")
        return clean(text)

    def _too_long(self, found: str) -> DataError:
        return DataError(
            f"a caption of {found} characters, more than {self._limits.caption_chars:,} "
            f"(data.limits.caption_chars)",
            slug="caption-too-long",
        )


def find(members: Mapping[str, bytes], key: str) -> list[str]:
    """Every clean, non-empty caption that a sample has under `key`; see `choose`.

    Raises:
        ConfigError: `key` is neither a member of text such as `txt` nor `json:FIELD`.
        DataError: A member is not UTF-8, is not JSON, or a text is too long (slug `bad-text`,
            `bad-json`, `caption-too-long`).
    """
    return Texts(members).find(key)


def choose(
    texts: Texts,
    keys: Sequence[str],
    weights: Sequence[float],
    draws: Sequence[float] | None,
    fits: Callable[[str], bool] | None = None,
) -> str | None:
    """Draw one clean caption from a sample.

    First a key is drawn by weight among those that have a caption, then one of its captions, each
    as likely as another.

    Args:
        texts: Of the sample.
        keys: Where captions are: `txt`, `json:FIELD`.
        weights: How often each key is used; the same length as `keys`.
        draws: Two of the sample's own numbers in `[0, 1)`, for the key and the caption; None takes
            the first caption of the first key that has one.
        fits: Captions for which it is false are passed over; None takes any.

    Returns:
        The caption, or None where no key has one.

    Raises:
        DataError: As for `find`.
    """
    offers: list[tuple[list[str], float]] = []
    for key, weight in zip(keys, weights, strict=True):
        found = texts.find(key)
        if fits is not None:
            found = [caption for caption in found if fits(caption)]
        if found:
            offers.append((found, weight))
    if not offers:
        return None
    if draws is None:
        return offers[0][0][0]
    captions = offers[0][0]
    if len(offers) > 1:
        steps = list(itertools.accumulate(weight for _, weight in offers))
        place = draws[0] * steps[-1]
        # Without any weight left, the first key that has a caption.
        captions = next(
            (found for (found, _), step in zip(offers, steps, strict=True) if place < step),
            captions,
        )
    return captions[int(draws[1] * len(captions))]


def _is_rubbish(char: str) -> bool:
    """Control, formatting (byte-order marks, text-direction overrides) or half a surrogate pair."""
    return char not in _JOINERS and unicodedata.category(char) in ("Cc", "Cf", "Cs")


def _limit_marks(text: str) -> str:
    """`text` without what goes beyond `_MOST_MARKS` accents in a row."""
    if len(text) <= _MOST_MARKS:
        return text
    kept, marks = [], 0
    for char in text:
        marks = marks + 1 if unicodedata.combining(char) or char in _HIDDEN_MARKS else 0
        if marks <= _MOST_MARKS:
            kept.append(char)
    return text if len(kept) == len(text) else "".join(kept)
