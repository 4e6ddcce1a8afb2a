"""Greedy decoding of captions.

Captions are short, so there is no cache: the model processes the whole caption again for every
token. Images with a finished caption are removed from the batch, so all rows have the same length
and there is no padding.

Shapes: A images with unfinished captions, S tokens so far.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class CaptionModel(Protocol):
    """The model interface for caption generation."""

    def next_token_logits(self, images: Tensor, text_ids: Tensor, text_lengths: Tensor) -> Tensor:
        """Logits of the token after the last valid one, `[images, vocabulary]`."""


@torch.no_grad()  # not inference_mode: tensors cached by the model must stay usable in training
def generate_captions(
    model: CaptionModel, images: Tensor, *, start_id: int, end_id: int, max_length: int
) -> list[list[int]]:
    """Generate one caption for each image by greedy decoding.

    Args:
        model: The model. With expert parallelism, a call is collective and every rank must pass
            the same images.
        images: uint8 `[images, 3, side, side]`, on the model's device.
        start_id: First token of every caption.
        end_id: Token that ends a caption.
        max_length: Maximum number of tokens of a caption, including the start and end tokens; at
            least 2.

    Returns:
        For each image the token ids between the start and end tokens.
    """
    captions: list[list[int]] = [[] for _ in range(images.shape[0])]
    ids_AS = torch.full((images.shape[0], 1), start_id, dtype=torch.int64, device=images.device)
    image_index_A = torch.arange(images.shape[0], device=images.device)

    # One position is reserved for the end token, as when long captions are truncated for training.
    while image_index_A.numel() and ids_AS.shape[1] < max_length - 1:
        lengths_A = torch.full_like(image_index_A, ids_AS.shape[1])
        next_A = model.next_token_logits(images[image_index_A], ids_AS, lengths_A).argmax(dim=-1)
        ids_AS = torch.cat([ids_AS, next_A[:, None]], dim=1)

        unfinished_A = next_A != end_id
        image_index_A, ids_AS = image_index_A[unfinished_A], ids_AS[unfinished_A]
        for index, token in zip(image_index_A.tolist(), ids_AS[:, -1].tolist(), strict=True):
            captions[index].append(token)

    return captions
