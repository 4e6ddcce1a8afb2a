"""Labels files: the candidate captions of zero-shot evaluation, one per line."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence

from data_pipeline.common.errors import DataError
from data_pipeline.common.escaping import escape_control
from data_pipeline.common.storage import read_bytes, redact
from data_pipeline.common.tables import truncate
from data_pipeline.content.captions import clean_caption, hash_clean_caption

logger = logging.getLogger(__name__)

_LINE_END = re.compile("\r\n|\n|\r")
"""Not `str.splitlines`, which also splits at form feeds and Unicode line separators: a label that
contains one would become two."""
_INVISIBLE = "\u200c\u200d\ufe0e\ufe0f"
"""Joiners, and the selectors of the text and the emoji form of a character."""
_MAX_CHARS = 60
"""Characters of a label in a message."""


def read_labels(address: str) -> tuple[str, ...]:
    """Clean captions of a labels file; empty lines are ignored, repeated labels are logged.

    Raises:
        DataError: It cannot be read, is not UTF-8, or contains no caption.
    """
    name = escape_control(redact(address))
    try:
        text = read_bytes(address).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"labels file {name} is not UTF-8: {error}") from error
    captions = [clean_caption(line) for line in _LINE_END.split(text)]
    numbered = [(number, caption) for number, caption in enumerate(captions, 1) if caption]
    if not numbered:
        raise DataError(f"labels file {name} contains no caption; expected one per line")
    _log_labels(name, numbered)
    return tuple(caption for _, caption in numbered)


def _log_labels(name: str, numbered: Sequence[tuple[int, str]]) -> None:
    """Log the number of labels, and those that are equal or nearly equal."""
    equal = _groups(numbered, hash_clean_caption)
    distinct = [group[0] for group in equal]
    similar = [group for group in _groups(distinct, _skeleton) if len(group) > 1]
    logger.info("%s: %d labels", name, len(distinct))
    repeated = [group for group in equal if len(group) > 1]
    if repeated:
        logger.warning(
            "%s: %d of %d lines repeat an earlier label, except for case and spaces, and are "
            "ignored: %s",
            name, len(numbered) - len(distinct), len(numbered), _describe(repeated[0]),
        )  # fmt: skip
    if similar:
        logger.warning(
            "%s: %d labels differ from another only in punctuation or Unicode forms (such as full "
            "width); each is a candidate of its own: %s",
            name, sum(map(len, similar)), _describe(similar[0]),
        )  # fmt: skip


def _groups(
    numbered: Sequence[tuple[int, str]], key: Callable[[str], object]
) -> list[list[tuple[int, str]]]:
    groups = defaultdict(list)
    for number, caption in numbered:
        groups[key(caption)].append((number, caption))
    return list(groups.values())


def _skeleton(caption: str) -> str:
    """A caption without case, compatibility forms, punctuation, spaces and joiners."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", caption).casefold())
    kept = (char for char in folded if unicodedata.category(char)[0] not in "PZ")
    return "".join(char for char in kept if char not in _INVISIBLE) or caption


def _describe(group: Sequence[tuple[int, str]]) -> str:
    return ", ".join(
        f"'{truncate(escape_control(caption), _MAX_CHARS)}' in line {number}"
        for number, caption in group[:3]
    )
