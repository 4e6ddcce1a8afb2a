"""The words of captions, token by token: what an expert sees is easier to read in words than in
pieces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

LONGEST = 24
"""Letters of a word that pieces are joined to. Where nothing parts words, a caption would be one:
pieces stay alone."""

_BLANK = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_MARK = re.compile(r"<(pad|start|end|unk)>")


class Spelling(Protocol):
    """What is needed of a tokenizer."""

    def piece(self, token: int) -> str: ...


class WordVocabulary:
    """Numbers words as they come."""

    def __init__(self, tokenizer: Spelling) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}
        self._numbers: dict[str, int] = {}

    @property
    def words(self) -> list[str]:
        """Every word so far, by its number."""
        return list(self._numbers)

    def numbers(self, ids: Sequence[int]) -> np.ndarray:
        """The word that each token of one caption belongs to, int64 `[tokens]`; marks are words of
        their own."""
        pieces = [self._piece(token) for token in ids]
        return np.array(
            [self._numbers.setdefault(word, len(self._numbers)) for word in words_of(pieces)],
            dtype=np.int64,
        )

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._tokenizer.piece(token)
        return self._pieces[token]


def words_of(pieces: Sequence[str]) -> list[str]:
    """The word of each piece of a caption, as SentencePiece spells pieces: `▁` begins a word,
    `<0xE9>` is a byte."""
    groups: list[list[str]] = []
    for place, piece in enumerate(pieces):
        alone = _MARK.fullmatch(piece) or (place and _MARK.fullmatch(pieces[place - 1]))
        if not groups or alone or piece.startswith(_BLANK):
            groups.append([])
        groups[-1].append(piece)
    words = []
    for group in groups:
        whole = _spelt(group)
        words += (
            [whole] * len(group) if len(whole) <= LONGEST else [_spelt([piece]) for piece in group]
        )
    return words


def _spelt(pieces: Sequence[str]) -> str:
    """Pieces as text; bytes that are no letter by themselves become a replacement sign."""
    parts = [
        bytes([int(found[1], 16)]) if (found := _BYTE.fullmatch(piece)) else piece.encode()
        for piece in pieces
    ]
    text = b"".join(parts).decode("utf-8", errors="replace")
    return text.removeprefix(_BLANK).replace(_BLANK, " ") or _BLANK
