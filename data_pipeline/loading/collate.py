"""Items to tensors: pictures stacked, captions padded to the longest of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data_pipeline.content.recipe import Item
from data_pipeline.samples import Batch, SampleProblem

# Shapes: B pairs, S text positions, T valid text tokens.

TEXT_MULTIPLE = 8
"""S is a multiple of this, so that few different shapes reach the model."""


def collate(
    items: Sequence[Item],
    problems: Sequence[SampleProblem],
    *,
    image_size: int,
    text_length: int,
    pad_id: int,
    seconds: float = 0.0,
) -> Batch:
    """Make a batch of good items, in order; none at all gives tensors with `B = 0`.

    Args:
        items: Pictures uint8 `[3, image_size, image_size]` and token ids, at most `text_length`.
        problems: The samples that are missing, to be handed on.
        image_size: Side of the pictures, pixels.
        text_length: Most text positions.
        pad_id: Fills up shorter captions.
        seconds: Time spent so far, to be handed on.
    """
    images = np.empty((len(items), 3, image_size, image_size), dtype=np.uint8)
    lengths_B = np.array([len(item.ids) for item in items], dtype=np.int64)
    longest = int(lengths_B.max(initial=1))
    width = min(text_length, -(-longest // TEXT_MULTIPLE) * TEXT_MULTIPLE)
    ids_BS = np.full((len(items), width), pad_id, dtype=np.int64)
    for row, item in enumerate(items):
        images[row] = item.image_CHW
        ids_BS[row, : len(item.ids)] = item.ids
    valid_BS = np.arange(width) < lengths_B[:, None]
    return Batch(
        images=torch.from_numpy(images),
        text_ids=torch.from_numpy(ids_BS),
        text_lengths=torch.from_numpy(lengths_B),
        text_positions=torch.from_numpy(np.flatnonzero(valid_BS)),
        caption_hashes=torch.tensor([item.caption_hash for item in items], dtype=torch.int64),
        keys=tuple(item.key for item in items),
        captions=tuple(item.caption for item in items),
        problems=tuple(problems),
        seconds=seconds,
    )
