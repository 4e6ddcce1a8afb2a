"""Tokenizer statistics: caption lengths in tokens, vocabulary usage and byte fallback."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from data_pipeline.content.captions import clean_caption
from data_pipeline.content.tokenizer import (
    END_ID,
    NUM_BYTE_TOKENS,
    NUM_SPECIAL_TOKENS,
    START_ID,
    UNK_ID,
    Tokenizer,
)

MAX_TOKENS = 1 << 20
"""More tokens than any caption has, so that no caption is truncated."""
_COVERAGE_RATIOS = (0.9, 0.99, 0.999, 1.0)


@dataclass(frozen=True, kw_only=True)
class EncodingStats:
    """Statistics of encoded captions."""

    lengths: np.ndarray
    """int64 `[captions]`: number of tokens of each caption, start and end tokens included."""
    num_words: int
    """Words separated by whitespace."""
    num_characters: int
    num_tokens: int
    """Without start and end tokens."""
    num_byte_tokens: int
    """Of these, byte-fallback tokens for characters outside the vocabulary."""
    num_unknown_tokens: int
    num_used_pieces: int
    """Distinct token ids in the captions, without special and byte tokens."""

    def context_lengths(self) -> list[tuple[float, int, int]]:
        """Context lengths at which 90, 99, 99.9 and 100 % of the captions fit without truncation.

        Returns:
            The ratio of captions, the length of the longest of them, and this length rounded up to
            a multiple of 8 (batches are padded to a multiple of 8).
        """
        ordered = np.sort(self.lengths)
        rows = []
        for ratio in _COVERAGE_RATIOS:
            num_captions = min(len(ordered), int(np.ceil(ratio * len(ordered))))
            longest = int(ordered[num_captions - 1])
            rows.append((ratio, longest, -(-longest // 8) * 8))

        return rows


def encoding_stats(tokenizer: Tokenizer, captions: Iterable[str]) -> EncodingStats:
    """Encode captions and compute statistics."""
    counts, lengths = np.zeros(tokenizer.vocab_size, np.int64), []
    num_words = num_characters = 0
    for text in captions:
        caption = clean_caption(text)
        ids = tokenizer.encode(caption, MAX_TOKENS)
        np.add.at(counts, ids[1:-1], 1)  # without the start and end tokens
        lengths.append(len(ids))
        num_words += len(caption.split())
        num_characters += len(caption)

    byte_ids = byte_token_ids(tokenizer)
    piece_counts = counts.copy()
    piece_counts[[START_ID, END_ID, UNK_ID, *byte_ids]] = 0
    return EncodingStats(
        lengths=np.array(lengths, np.int64),
        num_words=num_words,
        num_characters=num_characters,
        num_tokens=int(counts.sum()),
        num_byte_tokens=int(counts[byte_ids].sum()),
        num_unknown_tokens=int(counts[UNK_ID]),
        num_used_pieces=int((piece_counts > 0).sum()),
    )


def byte_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the byte-fallback tokens."""
    byte_pieces = {f"<0x{value:02X}>" for value in range(NUM_BYTE_TOKENS)}
    return [
        token_id
        for token_id in range(tokenizer.vocab_size)
        if tokenizer.piece(token_id) in byte_pieces
    ]


def longest_pieces(tokenizer: Tokenizer, count: int) -> list[str]:
    """The `count` longest pieces, longest first, with the word-boundary marker shown as `_`."""
    excluded = {*range(NUM_SPECIAL_TOKENS), *byte_token_ids(tokenizer)}
    pieces = [
        tokenizer.piece(token_id)
        for token_id in range(tokenizer.vocab_size)
        if token_id not in excluded
    ]
    pieces.sort(key=lambda piece: (-len(piece), piece))
    return [piece.replace("\u2581", "_") for piece in pieces[:count]]
