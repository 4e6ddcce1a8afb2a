"""Synthetic global batches, determined by the seed, the step and the row alone.

Each pair is generated independently, so a row is the same however the batch is split. Captions have
unequal lengths and three pairs share one caption, so that errors in counting tokens or in masking
equal captions are detected. Any row can be missing, as corrupt samples are in training.

Shapes: B pairs, S text positions.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.common.seeds import named_seed
from data_pipeline.content.tokenizer import END_ID, START_ID, UNK_ID
from data_pipeline.loading.collate import TEXT_LENGTH_MULTIPLE
from data_pipeline.samples import Batch
from pretrain.config.schema import ModelConfig
from pretrain.model.vision_language import valid_positions


class GlobalBatch(NamedTuple):
    """The pairs of one optimizer step over all ranks."""

    model: ModelConfig
    """Sizes of images, captions and vocabulary."""
    seed: int
    step: int
    pairs: int
    """Rows, including missing ones."""
    missing: Collection[int] = ()
    """Rows without a pair."""

    def rows(self, first: int, count: int) -> Batch:
        """The micro-batch of `count` rows from `first` on; missing rows leave gaps in `slots`."""
        present = [row for row in range(first, first + count) if row not in self.missing]
        captions = [self._caption(row) for row in present]
        lengths_B = torch.tensor([len(caption) for caption in captions], dtype=torch.int64)
        text_ids = self._pad(captions)
        hashes = [100 + self._caption_row(row) for row in present]

        return Batch(
            images=self._images(present),
            text_ids=text_ids,
            text_lengths=lengths_B,
            text_positions=valid_positions(lengths_B, text_ids.shape[1]),
            caption_hashes=torch.tensor(hashes, dtype=torch.int64),
            keys=(),
            captions=(),
            problems=(),
            seconds=0.0,
            ids=torch.tensor([self.step * self.pairs + row for row in present], dtype=torch.int64),
            slots=torch.tensor([row - first for row in present], dtype=torch.int64),
        )

    def _pad(self, captions: list[Tensor]) -> Tensor:
        """Token ids, int64 `[B, S]`.

        Padded as by the data loader: the amount of padding differs between ranks and micro-batches.
        """
        longest = max(map(len, captions), default=1)
        rounded = -(-longest // TEXT_LENGTH_MULTIPLE) * TEXT_LENGTH_MULTIPLE
        width = min(self.model.context_length, rounded)

        text_ids = torch.zeros(len(captions), width, dtype=torch.int64)
        for index, caption in enumerate(captions):
            text_ids[index, : len(caption)] = caption
        return text_ids

    def _images(self, rows: list[int]) -> Tensor:
        if rows:
            return torch.stack([self._image(row) for row in rows])
        side = self.model.image_size
        return torch.zeros(0, 3, side, side, dtype=torch.uint8)

    def _caption_row(self, row: int) -> int:
        """The row that seeds this row's caption: `row` itself, or 0 for two distant rows."""
        # Multiples of 5, which `missing_rows` never removes for `missing=pairs`.
        return 0 if row in (5 * (self.pairs // 10), 5 * ((self.pairs - 1) // 5)) else row

    def _image(self, row: int) -> Tensor:
        """Coarse color patches with noise, uint8 `[3, side, side]`."""
        side, generator = self.model.image_size, self._generator("picture", row)
        coarse = torch.rand(1, 3, 4, 4, generator=generator)
        image = 200 * torch.nn.functional.interpolate(coarse, (side, side), mode="nearest")[0]
        return (image + 55 * torch.rand(3, side, side, generator=generator)).to(torch.uint8)

    def _caption(self, row: int) -> Tensor:
        """Start token, random tokens, end token; int64."""
        generator = self._generator("caption", self._caption_row(row))
        max_tokens = self.model.context_length - 2
        count = int(torch.randint(min(1, max_tokens), max_tokens + 1, (1,), generator=generator))
        ids = torch.randint(UNK_ID + 1, self.model.vocab_size, (count,), generator=generator)
        return torch.cat([torch.tensor([START_ID]), ids, torch.tensor([END_ID])])

    def _generator(self, content: str, row: int) -> torch.Generator:
        return torch.Generator().manual_seed(
            named_seed(self.seed, "check", content, self.step, row)
        )
