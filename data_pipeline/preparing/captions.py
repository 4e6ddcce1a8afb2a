"""The captions of a sample, for tools that take all of them or the first."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.content.captions import Texts
from data_pipeline.samples import RawSample


def all_captions(raw: RawSample, keys: Sequence[str]) -> list[list[str]]:
    """The clean captions under each key.

    Raises:
        DataError: A member is not UTF-8 or not JSON, or a caption is too long (see
        `content.captions`).
    """
    texts = Texts(raw.members)
    return [texts.find(key) for key in keys]


def first_caption(raw: RawSample, keys: Sequence[str]) -> str | None:
    """The first caption of the first key that has one; what evaluation uses. Errors as for
    `all_captions`."""
    return next((caption for found in all_captions(raw, keys) for caption in found), None)
