"""Tokenizes and embeds texts for retrieval.

Shapes: M texts, S text positions, T valid tokens of all texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.content.tokenizer import Tokenizer
from pretrain.model.vision_language import VisionLanguageModel


class TextBatch(NamedTuple):
    """Tokenized texts."""

    ids_MS: Tensor
    """int64, padded on the right."""
    lengths_M: Tensor
    """Number of valid tokens of each text, int64."""
    positions_T: Tensor
    """Flat indices m x S + s of the valid tokens, int64, ascending."""


def batch_texts(tokenizer: Tokenizer, texts: Sequence[str], context_length: int) -> TextBatch:
    """Tokenize texts and pad them to the longest one."""
    rows = [tokenizer.encode(text, context_length) for text in texts]
    width = max((len(row) for row in rows), default=0)
    ids_MS = torch.full((len(rows), width), tokenizer.pad_id, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids_MS[index, : len(row)] = torch.tensor(row)

    lengths_M = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    valid_MS = torch.arange(width) < lengths_M[:, None]
    return TextBatch(ids_MS, lengths_M, valid_MS.flatten().nonzero().flatten())


def embed_texts(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    context_length: int,
    texts_per_forward: int,
    device: torch.device,
    on_progress: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Unit vectors of texts, `[texts, embed_dim]` on `device`; `on_progress` is called with the
    number of texts of each forward pass."""
    embeddings = []
    for first in range(0, len(texts), texts_per_forward):
        part = texts[first : first + texts_per_forward]
        batch = batch_texts(tokenizer, part, context_length)
        embeddings.append(model.encode_text(*(tensor.to(device) for tensor in batch)))
        on_progress(len(part))
    return torch.cat(embeddings)
