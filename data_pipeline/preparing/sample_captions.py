"""The captions of a sample, for commands that read all of them or the first one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from data_pipeline.content.captions import SampleTexts
from data_pipeline.samples import RawSample


def all_captions(raw: RawSample, keys: Sequence[str]) -> list[list[str]]:
    """The cleaned captions under each key.

    Raises:
        DataError: A member is not UTF-8 or not JSON, or a caption is too long (see
            `content.captions`).
    """
    texts = SampleTexts(raw.members)
    return [texts.find_captions(key) for key in keys]


def first_caption(raw: RawSample, keys: Sequence[str]) -> str | None:
    """The first caption of the first key that has one, as in evaluation.

    Raises:
        DataError: As for `all_captions`.
    """
    return next(chain.from_iterable(all_captions(raw, keys)), None)
