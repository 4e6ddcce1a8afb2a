"""Captions generated during training are the same on every rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from pretrain.evaluate.generation import generate_captions
from pretrain.parallel.engine import Engine
from pretrain.train.caption_samples import RankZeroLogits

END, WORD = 2, 5


class Model:
    """Generates one `WORD` and ends. At the first position the two logits differ by `margin`."""

    def __init__(self, *, margin: float) -> None:
        self.margin = margin

    def next_token_logits(self, images: Tensor, text_ids: Tensor, text_lengths: Tensor) -> Tensor:
        logits = torch.zeros(images.shape[0], 8)
        logits[:, END] = 1.0
        logits[:, WORD] = 1.0 + (self.margin if text_ids.shape[1] == 1 else -1.0)
        return logits


def test_all_ranks_use_the_logits_of_rank_0() -> None:
    sent: list[Tensor] = []

    def all_reduce_on_rank_0(values: Tensor) -> Tensor:
        sent.append(values)
        return values

    def all_reduce_on_rank_1(values: Tensor) -> Tensor:
        return values + sent.pop(0)

    captions = []
    for rank, margin, all_reduce_sum in (
        (0, 1e-6, all_reduce_on_rank_0),
        (1, -1e-6, all_reduce_on_rank_1),
    ):
        communicator = SimpleNamespace(rank=rank, all_reduce_sum=all_reduce_sum)
        attributes: dict[str, Any] = {
            "communicator": communicator,
            "model": Model(margin=margin),
        }
        engine = cast(Engine, SimpleNamespace(**attributes))
        images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
        captions.append(
            generate_captions(RankZeroLogits(engine), images, start_id=1, end_id=END, max_length=6)
        )
    assert captions == [[[WORD]] * 3] * 2
    assert not sent  # both ranks made the same number of collective calls
