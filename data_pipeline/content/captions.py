"""Caption extraction, cleaning and selection.

A sample may have several captions, in a text member such as `.txt` and in fields of its `.json`
member. A caption key is either the extension of a text member (`txt`, `en.txt`) or `json:FIELD`,
where the field is a string or a list of strings. Only members with a text extension are read,
whatever the settings are.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.caption_characters import normalize, remove_characters
from data_pipeline.content.json_fields import get_field, parse_json_fields
from data_pipeline.sample_keys import TEXT_EXTENSIONS
from data_pipeline.settings import LimitConfig

_DEFAULT_LIMITS = LimitConfig()


def clean_caption(text: str) -> str:
    """Canonical form of a caption, in which it is stored, compared and tokenized.

    Unicode NFC; each run of whitespace becomes one space, none at the ends; no control, surrogate
    or invisible formatting characters (see `caption_characters`); at most 30 combining marks per
    letter. Idempotent.
    """
    # All characters to remove are unprintable, and so is all whitespace except the space.
    if not text.isprintable():
        text = remove_characters(text)
    if not text.isascii():
        # After the removal, because a removed character may have separated a letter and its mark.
        text = normalize(text)
    return " ".join(text.split())


def hash_caption(text: str) -> int:
    """Hash in `[0, 2**63)`, equal for captions that differ only in case and whitespace."""
    return hash_clean_caption(clean_caption(text))


def hash_clean_caption(caption: str) -> int:
    """`hash_caption` of a caption that is already clean."""
    folded = caption.casefold().encode()
    return int.from_bytes(hashlib.blake2b(folded, digest_size=8).digest(), "big") >> 1


def check_caption_key(key: str) -> None:
    """Validate a caption key.

    Raises:
        ConfigError: `key` is neither a text member such as `txt` nor `json:FIELD`.
    """
    member, colon, field = key.partition(":")
    if (member, colon) == ("json", ":") and field:
        return

    if colon or member.rpartition(".")[2] not in TEXT_EXTENSIONS:
        extensions = ", ".join(sorted(TEXT_EXTENSIONS))
        raise ConfigError(
            f"data.caption_keys: {key!r} is neither a text member (extension {extensions}, with or "
            f"without a prefix, such as 'en.txt') nor 'json:FIELD'"
        )


class SampleTexts:
    """Captions and JSON fields of one sample; each is decoded and cleaned at most once."""

    def __init__(self, members: Mapping[str, bytes], limits: LimitConfig = _DEFAULT_LIMITS) -> None:
        """Store the members without reading them.

        Args:
            members: The sample's files by extension, e.g. `{"txt": b"...", "json": b"..."}`.
            limits: Maximum caption length and JSON depth.
        """
        self._members, self._limits = members, limits
        self._captions: dict[str, list[str]] = {}
        self._fields: dict[str, object] | None = None

    def fields(self) -> dict[str, object]:
        """Fields of the `.json` member; empty if there is no such member.

        Raises:
            DataError: The member is not a JSON object or exceeds a limit (slug `invalid-json`), or
                is not UTF-8 (slug `invalid-text`).
        """
        if self._fields is None:
            data = self._members.get("json")
            self._fields = {} if data is None else parse_json_fields(data, self._limits.json_depth)
        return self._fields

    def find_captions(self, key: str) -> list[str]:
        """All clean, non-empty captions under `key`; see the function `find_captions`."""
        captions = self._captions.get(key)
        if captions is None:
            captions = self._captions[key] = self._read_captions(key)
        return captions

    def _read_captions(self, key: str) -> list[str]:
        cleaned = map(self._clean, self.raw_texts(key))
        return [caption for caption in cleaned if caption]

    def raw_texts(self, key: str) -> list[str]:
        """The texts under `key` as stored, before cleaning; raises as `find_captions` does."""
        check_caption_key(key)
        member, colon, field = key.partition(":")

        texts: list[object]
        if colon:
            value = get_field(self.fields(), (field,))
            texts = value if isinstance(value, list) else [value]
        else:
            data = self._members.get(member)
            if data is None:
                return []
            texts = [self._decode(member, data)]

        return [text for text in texts if isinstance(text, str)]

    def _decode(self, member: str, data: bytes) -> str:
        # A character takes at most four bytes, so a longer member need not be decoded.
        if len(data) > 4 * self._limits.caption_chars:
            raise self._too_long(f"at least {len(data) // 4:,}")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"the .{member} member is not UTF-8: {error}", slug="invalid-text"
            ) from error

    def _clean(self, text: str) -> str:
        if len(text) > self._limits.caption_chars:
            raise self._too_long(f"{len(text):,}")
        return clean_caption(text)

    def _too_long(self, length: str) -> DataError:
        return DataError(
            f"caption of {length} characters, more than {self._limits.caption_chars:,} "
            f"(data.limits.caption_chars)",
            slug="caption-too-long",
        )


def find_captions(members: Mapping[str, bytes], key: str) -> list[str]:
    """All clean, non-empty captions of a sample under one caption key.

    Raises:
        ConfigError: `key` is neither a text member such as `txt` nor `json:FIELD`.
        DataError: A member is not UTF-8 (slug `invalid-text`) or not JSON (slug `invalid-json`), or
            a text is too long (slug `caption-too-long`).
    """
    return SampleTexts(members).find_captions(key)


def all_captions(members: Mapping[str, bytes], keys: Sequence[str]) -> list[list[str]]:
    """The clean captions of a sample under each key.

    Raises:
        ConfigError, DataError: As for `find_captions`.
    """
    texts = SampleTexts(members)
    return [texts.find_captions(key) for key in keys]


def first_caption(members: Mapping[str, bytes], keys: Sequence[str]) -> str | None:
    """The first caption of the first key that has one, as in evaluation.

    Raises:
        ConfigError, DataError: As for `find_captions`.
    """
    return next(itertools.chain.from_iterable(all_captions(members, keys)), None)


def no_caption_error(members: Iterable[str], keys: Sequence[str]) -> DataError:
    """The error of a sample without a caption (slug `no-caption`), with the keys that may have one.

    Args:
        members: Extensions of its files.
        keys: Caption keys that have no caption.
    """
    members = tuple(members)
    others = [member for member in members if member.rpartition(".")[2] in TEXT_EXTENSIONS]
    others += ["json:FIELD"] * ("json" in members and not any(key[:5] == "json:" for key in keys))
    others = [key for key in others if key not in keys]
    hint = f"; to use {others[0]}, add it to data.caption_keys" if others else ""
    files = ", ".join(members) or "none"
    return DataError(
        f"no caption under {', '.join(keys)}; the sample's files are {files}{hint}",
        slug="no-caption",
    )


def select_caption(
    texts: SampleTexts,
    keys: Sequence[str],
    weights: Sequence[float],
    uniforms: Sequence[float] | None,
    accept: Callable[[str], bool] | None = None,
) -> str | None:
    """Select one caption of a sample.

    A key is sampled by weight among the keys that have an accepted caption, then one of its
    captions uniformly.

    Args:
        texts: Texts of the sample.
        keys: Caption keys: `txt`, `json:FIELD`.
        weights: Relative sampling weight of each key; same length as `keys`.
        uniforms: Two numbers in `[0, 1)`, for the key and for the caption; None selects the first
            caption of the first key that has one.
        accept: Predicate on captions; None accepts all.

    Returns:
        The caption, or None if there is no accepted caption under any key.

    Raises:
        DataError: As for `find_captions`.
    """
    candidates: list[tuple[list[str], float]] = []
    for key, weight in zip(keys, weights, strict=True):
        captions = texts.find_captions(key)
        if accept is not None:
            captions = [caption for caption in captions if accept(caption)]
        if captions:
            candidates.append((captions, weight))

    if not candidates:
        return None
    if uniforms is None:
        return candidates[0][0][0]

    captions = _sample_key(candidates, uniforms[0])
    return captions[int(uniforms[1] * len(captions))]


def _sample_key(candidates: list[tuple[list[str], float]], uniform: float) -> list[str]:
    """Captions of one key, sampled by weight; of the first key if all weights are 0."""
    if len(candidates) == 1:
        return candidates[0][0]
    cumulative = list(itertools.accumulate(weight for _, weight in candidates))
    threshold = uniform * cumulative[-1]
    for (captions, _), upper in zip(candidates, cumulative, strict=True):
        if threshold < upper:
            return captions
    return candidates[0][0]
