"""How good written captions are: letter for letter, and token by token.

Exact match compares what the model writes on its own with the caption. Token accuracy gives it the
right beginning each time and asks for the next token, so it moves long before whole captions match.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from data_pipeline.content.captions import clean


class TokenModel(Protocol):
    """What counting tokens needs from a model."""

    def caption_token_hits(
        self, images: Tensor, text_ids: Tensor, text_lengths: Tensor, text_positions: Tensor
    ) -> tuple[int, int]:
        """Caption tokens predicted right given the earlier ones, and how many there are."""


def same_caption(written: str, true: str) -> bool:
    """Whether two captions are the same once cleaned; capitals count."""
    return clean(written) == clean(true)


def exact_percent(written: Sequence[str], true: Sequence[str]) -> float:
    """Percent of captions that are exactly right; 0 without captions."""
    hits = sum(same_caption(one, other) for one, other in zip(written, true, strict=True))
    return 100 * hits / max(1, len(true))


def token_percent(counts: Iterable[tuple[int, int]]) -> float:
    """Percent of tokens predicted right, from (hits, tokens) of each batch; 0 without tokens.

    Sums first, then one division: batches hold different numbers of tokens.
    """
    hits, tokens = 0, 0
    for batch_hits, batch_tokens in counts:
        hits, tokens = hits + batch_hits, tokens + batch_tokens
    return 100 * hits / max(1, tokens)
