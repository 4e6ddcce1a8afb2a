"""The synthetic global batch: made from the run's sizes, the same whoever asks, each pair on its
own. Pure.

Captions have unequal lengths, and three pairs share one caption, so that what depends on counts or
on equal captions would show. Any row can be missing, as bad samples are.

Shapes: B pairs, S text positions.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.common.seeds import named_seed
from data_pipeline.content.tokenizer import END_ID, START_ID, UNK_ID
from data_pipeline.loading.collate import TEXT_MULTIPLE
from data_pipeline.samples import Batch
from pretrain.config.schema import ModelConfig
from pretrain.model.vision_language import valid_positions


class GlobalBatch(NamedTuple):
    """The pairs of one step of the whole world."""

    model: ModelConfig
    """Sizes of pictures, captions and vocabulary."""
    seed: int
    step: int
    pairs: int
    """Rows, the missing ones included."""
    missing: Collection[int] = ()
    """Rows without a pair."""

    def rows(self, first: int, count: int) -> Batch:
        """A micro-batch: the rows from `first` on; missing ones leave gaps in its slots."""
        there = [row for row in range(first, first + count) if row not in self.missing]
        captions = [self._caption(row) for row in there]
        lengths_B = torch.tensor([len(caption) for caption in captions], dtype=torch.int64)
        longest = max(map(len, captions), default=1)
        # Padded as the loader does: ranks and micro-batches have different amounts of padding.
        width = min(self.model.context_length, -(-longest // TEXT_MULTIPLE) * TEXT_MULTIPLE)
        text_ids = torch.zeros(len(there), width, dtype=torch.int64)
        for place, caption in enumerate(captions):
            text_ids[place, : len(caption)] = caption
        side = self.model.image_size
        return Batch(
            images=torch.stack([self._picture(row) for row in there])
            if there
            else torch.zeros(0, 3, side, side, dtype=torch.uint8),
            text_ids=text_ids,
            text_lengths=lengths_B,
            text_positions=valid_positions(lengths_B, width),
            caption_hashes=torch.tensor(
                [100 + self._twin(row) for row in there], dtype=torch.int64
            ),
            keys=(),
            captions=(),
            problems=(),
            seconds=0.0,
            ids=torch.tensor([self.step * self.pairs + row for row in there], dtype=torch.int64),
            slots=torch.tensor([row - first for row in there], dtype=torch.int64),
        )

    def _twin(self, row: int) -> int:
        """The row whose caption this one has: its own, but for three rows far apart."""
        # Multiples of 5, which `pretrain.check.cells.missing_rows` never takes a few of.
        return 0 if row in (5 * (self.pairs // 10), 5 * ((self.pairs - 1) // 5)) else row

    def _picture(self, row: int) -> Tensor:
        """Coarse patches of color with noise on them, uint8 `[3, side, side]`."""
        side, generator = self.model.image_size, self._generator("picture", row)
        coarse = torch.rand(1, 3, 4, 4, generator=generator)
        picture = 200 * torch.nn.functional.interpolate(coarse, (side, side), mode="nearest")[0]
        return (picture + 55 * torch.rand(3, side, side, generator=generator)).to(torch.uint8)

    def _caption(self, row: int) -> Tensor:
        """Start, some words, end; int64."""
        generator = self._generator("caption", self._twin(row))
        most = self.model.context_length - 2
        words = int(torch.randint(min(1, most), most + 1, (1,), generator=generator))
        first_word = UNK_ID + 1
        ids = torch.randint(first_word, self.model.vocab_size, (words,), generator=generator)
        return torch.cat([torch.tensor([START_ID]), ids, torch.tensor([END_ID])])

    def _generator(self, what: str, row: int) -> torch.Generator:
        return torch.Generator().manual_seed(named_seed(self.seed, "check", what, self.step, row))
