"""Tokenizer statistics: caption lengths in tokens, vocabulary usage and byte fallback."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from data_pipeline.content.captions import clean_caption
from data_pipeline.content.tokenizer import END_ID, START_ID, UNK_ID, Tokenizer

MAX_TOKENS = 1 << 20
"""More tokens than any caption has, so that no caption is truncated."""
NUM_SPECIAL_TOKENS, NUM_BYTE_TOKENS = 4, 256
_COVERAGE_RATIOS = (0.9, 0.99, 0.999, 1.0)


@dataclass(frozen=True, kw_only=True)
class EncodingStats:
    """Statistics of encoded captions."""

    lengths: np.ndarray
    """int64 `[captions]`: tokens of each caption, start and end tokens included."""
    words: int
    """Words separated by whitespace."""
    characters: int
    tokens: int
    """Without start and end tokens."""
    byte_tokens: int
    """Of these, byte-fallback tokens for characters outside the vocabulary."""
    unknown_tokens: int
    used: int
    """Number of distinct ids, without special and byte tokens."""

    def context_lengths(self) -> list[tuple[float, int, int]]:
        """Context lengths that fit given ratios of the captions without truncation.

        Returns:
            The ratio, the longest caption within it, and its length rounded up to a multiple of 8
            (batches are padded to a multiple of 8).
        """
        ordered = np.sort(self.lengths)
        rows = []
        for ratio in _COVERAGE_RATIOS:
            rank = min(len(ordered), int(np.ceil(ratio * len(ordered)))) - 1
            longest = int(ordered[rank])
            rows.append((ratio, longest, -(-longest // 8) * 8))

        return rows


def encoding_stats(tokenizer: Tokenizer, captions: Iterable[str]) -> EncodingStats:
    """Encode captions and compute statistics."""
    counts, lengths = np.zeros(tokenizer.vocab_size, np.int64), []
    words = characters = 0
    for text in captions:
        caption = clean_caption(text)
        ids = tokenizer.encode(caption, MAX_TOKENS)
        np.add.at(counts, ids[1:-1], 1)
        lengths.append(len(ids))
        words += len(caption.split())
        characters += len(caption)

    byte_tokens = byte_token_ids(tokenizer)
    piece_counts = counts.copy()
    piece_counts[[START_ID, END_ID, UNK_ID, *byte_tokens]] = 0
    return EncodingStats(
        lengths=np.array(lengths, np.int64),
        words=words,
        characters=characters,
        tokens=int(counts.sum()),
        byte_tokens=int(counts[byte_tokens].sum()),
        unknown_tokens=int(counts[UNK_ID]),
        used=int((piece_counts > 0).sum()),
    )


def byte_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the byte-fallback tokens."""
    names = {f"<0x{value:02X}>" for value in range(NUM_BYTE_TOKENS)}
    return [token for token in range(tokenizer.vocab_size) if tokenizer.piece(token) in names]


def longest_pieces(tokenizer: Tokenizer, count: int) -> list[str]:
    """The longest vocabulary pieces, longest first, with the word-boundary marker shown as `_`."""
    excluded = {*range(NUM_SPECIAL_TOKENS), *byte_token_ids(tokenizer)}
    pieces = [
        tokenizer.piece(token) for token in range(tokenizer.vocab_size) if token not in excluded
    ]
    pieces.sort(key=lambda piece: (-len(piece), piece))
    return [piece.replace("\u2581", "_") for piece in pieces[:count]]
