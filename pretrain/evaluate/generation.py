"""Writes captions: always the likeliest next token, until the end mark.

The model is run again over the whole caption for every token; captions are short. Pictures that are
finished leave the batch, so all rows have the same length and there is no padding.

Shapes: B pictures, A pictures still being written about, S tokens so far, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class WritingModel(Protocol):
    """What writing needs from a model."""

    def next_token_logits(self, images: Tensor, text_ids: Tensor, text_lengths: Tensor) -> Tensor:
        """Logits of the token after the last valid one, `[pictures, vocabulary]`."""


@torch.no_grad()  # not inference_mode: what a model keeps from here must stay usable in training
def write_captions(
    model: WritingModel, images: Tensor, *, start_id: int, end_id: int, max_length: int
) -> list[list[int]]:
    """Write one caption for each picture, greedily.

    Args:
        model: Any model; with expert parallelism every rank must give the same pictures.
        images: uint8 `[pictures, 3, side, side]`, on the model's device.
        start_id: First token of every caption.
        end_id: Token that ends one.
        max_length: Most tokens of a caption, both marks included; at least 2.

    Returns:
        For each picture the tokens between the marks.
    """
    written: list[list[int]] = [[] for _ in range(images.shape[0])]
    ids_AS = torch.full((images.shape[0], 1), start_id, dtype=torch.int64, device=images.device)
    open_A = torch.arange(images.shape[0], device=images.device)
    while open_A.numel() and ids_AS.shape[1] < max_length:
        lengths_A = torch.full_like(open_A, ids_AS.shape[1])
        next_A = model.next_token_logits(images[open_A], ids_AS, lengths_A).argmax(dim=-1)
        ids_AS = torch.cat([ids_AS, next_A[:, None]], dim=1)
        goes_on_A = next_A != end_id
        for picture, token, goes_on in zip(
            open_A.tolist(), next_A.tolist(), goes_on_A.tolist(), strict=True
        ):
            if goes_on:
                written[picture].append(token)
        open_A, ids_AS = open_A[goes_on_A], ids_AS[goes_on_A]
    # The place of the end mark stays free, as it does when a long caption is cut for training.
    return [tokens[: max_length - 2] for tokens in written]
