"""Captions written while training are the same on every rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from pretrain.evaluate.generation import write_captions
from pretrain.parallel.engine import TrainEngine
from pretrain.train.pictures import RankZeroLogits

END, WORD = 2, 5


class Model:
    """Writes one `WORD` at the first position and ends; says so by logits that a last bit turns
    over."""

    def __init__(self, *, margin: float) -> None:
        self.margin = margin

    def next_token_logits(self, images: Tensor, text_ids: Tensor, text_lengths: Tensor) -> Tensor:
        logits = torch.zeros(images.shape[0], 8)
        logits[:, END] = 1.0
        logits[:, WORD] = 1.0 + (self.margin if text_ids.shape[1] == 1 else -1.0)
        return logits


def test_ranks_that_would_choose_differently_write_what_rank_0_writes() -> None:
    sent: list[Tensor] = []

    def total_on_rank_0(values: Tensor) -> Tensor:
        sent.append(values)
        return values

    def total_on_rank_1(values: Tensor) -> Tensor:
        return values + sent.pop(0)

    written = []
    for rank, margin, total in ((0, 1e-6, total_on_rank_0), (1, -1e-6, total_on_rank_1)):
        parts: dict[str, Any] = {"rank": rank, "model": Model(margin=margin), "total": total}
        engine = cast(TrainEngine, SimpleNamespace(**parts))
        images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
        written.append(
            write_captions(RankZeroLogits(engine), images, start_id=1, end_id=END, max_length=6)
        )
    assert written == [[[WORD]] * 3] * 2
    assert not sent  # as many exchanges on both ranks
