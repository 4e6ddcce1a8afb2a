"""Maps caption tokens to words, because words are easier to read than subword tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from data_pipeline.content.tokenizer import Tokenizer

MAX_WORD_LENGTH = 24
"""Maximum characters of a word joined from several tokens. In scripts without spaces a whole
caption would be one word; its tokens stay separate."""

_SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPECIAL_TOKEN = re.compile(r"<(pad|start|end|unk)>")


class WordVocabulary:
    """Assigns indices to words in order of first appearance."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}
        self._index: dict[str, int] = {}

    @property
    def words(self) -> list[str]:
        """All words so far, by index."""
        return list(self._index)

    def word_indices(self, ids: Sequence[int]) -> np.ndarray:
        """Index of the word that contains each token of a caption, int64 `[tokens]`.

        Special tokens are words.
        """
        pieces = [self._piece(token) for token in ids]
        indices = [self._index.setdefault(word, len(self._index)) for word in words_of(pieces)]
        return np.array(indices, dtype=np.int64)

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._tokenizer.piece(token)
        return self._pieces[token]


def words_of(pieces: Sequence[str]) -> list[str]:
    """The word that contains each SentencePiece token: `▁` begins a word, `<0xE9>` is a byte."""
    groups: list[list[str]] = []
    previous_is_special = False
    for piece in pieces:
        is_special = bool(_SPECIAL_TOKEN.fullmatch(piece))
        if not groups or is_special or previous_is_special or piece.startswith(_SPACE):
            groups.append([])
        groups[-1].append(piece)
        previous_is_special = is_special

    words: list[str] = []
    for group in groups:
        word = _decode(group)
        if len(word) <= MAX_WORD_LENGTH:
            words += [word] * len(group)
        else:
            words += [_decode([piece]) for piece in group]
    return words


def _decode(pieces: Sequence[str]) -> str:
    """Tokens as text; invalid UTF-8 becomes a replacement character."""
    parts = []
    for piece in pieces:
        match = _BYTE_TOKEN.fullmatch(piece)
        parts.append(bytes([int(match[1], 16)]) if match else piece.encode())
    text = b"".join(parts).decode("utf-8", errors="replace")
    return text.removeprefix(_SPACE).replace(_SPACE, " ") or _SPACE
