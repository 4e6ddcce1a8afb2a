"""What a tokenizer makes of captions: how many tokens they take, and how many bytes are spelt
out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from data_pipeline.content.captions import clean
from data_pipeline.content.tokenizer import END_ID, START_ID, UNK_ID, Tokenizer

_LONGEST = 1 << 20
NUM_MARKS, NUM_BYTES = 4, 256
_COVERED = (0.9, 0.99, 0.999, 1.0)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """How captions were encoded."""

    lengths: np.ndarray
    """int64 `[captions]`: tokens of each, both marks included."""
    words: int
    """Pieces of text between blanks."""
    characters: int
    tokens: int
    """Without marks."""
    byte_tokens: int
    """Of these, bytes of characters that the vocabulary lacks."""
    unknown_tokens: int
    used: int
    """Different ids, without marks and bytes."""

    def text_lengths(self) -> list[tuple[float, int, int]]:
        """For some shares of the captions: the longest of them, and the text length that holds it
        whole.

        A text length is a multiple of 8, as batches are padded to such anyway.
        """
        ordered = np.sort(self.lengths)
        places = [min(len(ordered), int(np.ceil(share * len(ordered)))) - 1 for share in _COVERED]
        return [
            (share, int(ordered[place]), -(-int(ordered[place]) // 8) * 8)
            for share, place in zip(_COVERED, places, strict=True)
        ]


def encode_all(tokenizer: Tokenizer, captions: Iterable[str]) -> Encoded:
    """Encode captions and count."""
    counts, lengths = np.zeros(tokenizer.vocab_size, np.int64), []
    words = characters = 0
    for text in captions:
        caption = clean(text)
        ids = tokenizer.encode(caption, _LONGEST)
        np.add.at(counts, ids[1:-1], 1)
        lengths.append(len(ids))
        words += len(caption.split())
        characters += len(caption)
    bytes_of = byte_ids(tokenizer)
    pieces = counts.copy()
    pieces[[START_ID, END_ID, UNK_ID, *bytes_of]] = 0
    return Encoded(
        lengths=np.array(lengths, np.int64),
        words=words,
        characters=characters,
        tokens=int(counts.sum()),
        byte_tokens=int(counts[bytes_of].sum()),
        unknown_tokens=int(counts[UNK_ID]),
        used=int((pieces > 0).sum()),
    )


def byte_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that stand for one byte each."""
    names = {f"<0x{value:02X}>" for value in range(NUM_BYTES)}
    return [token for token in range(tokenizer.vocab_size) if tokenizer.piece(token) in names]


def longest_pieces(tokenizer: Tokenizer, count: int) -> list[str]:
    """The longest pieces of text, longest first, with the blank at the head shown as `_`."""
    special = {0, 1, 2, 3, *byte_ids(tokenizer)}
    pieces = (
        tokenizer.piece(token) for token in range(tokenizer.vocab_size) if token not in special
    )
    return [
        piece.replace("\u2581", "_")
        for piece in sorted(pieces, key=lambda piece: (-len(piece), piece))[:count]
    ]
