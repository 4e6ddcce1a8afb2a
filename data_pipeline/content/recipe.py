"""From a sample's files to what a batch is made of: decode, transform, choose a caption, tokenise.

Everything random is drawn from generators named after the sample (seed, epoch, shard, key), so a
sample looks the same on whichever rank or worker it is read, today and after a restart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipeline.common.errors import DataError
from data_pipeline.common.seeds import rng
from data_pipeline.content.captions import caption_hash, choose
from data_pipeline.content.images import decode
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.content.transforms import eval_transform, train_transform
from data_pipeline.samples import RawSample
from data_pipeline.settings import AugmentConfig

IMAGE_EXTENSIONS = frozenset(
    ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "jp2", "avif", "img", "image")
)
"""Members that may hold the picture; what it really is shows in its content."""


class Item(NamedTuple):
    """One good sample, ready for a batch."""

    image_CHW: np.ndarray
    """uint8 `[3, height, width]`."""
    ids: list[int]
    key: str
    caption: str
    caption_hash: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How items are made."""

    image_size: int
    """Side of the square picture, pixels."""
    text_length: int
    """Most text positions, marks included."""
    caption_keys: tuple[str, ...]
    caption_weights: tuple[float, ...]
    seed: int = 0
    augment: AugmentConfig | None = None
    """Changes to training pictures; None is evaluation: nothing is drawn, the first caption is used."""

    def make(self, raw: RawSample, epoch: int, tokenizer: Tokenizer) -> Item:
        """The item of one sample in one epoch.

        Raises:
            DataError: With a slug (`no-image`, `bad-image`, `no-caption`, `bad-json` ...): this sample
                cannot be used.
        """
        named = (epoch, raw.shard, raw.key)
        picture = decode(_picture(raw))
        if self.augment is None:
            image = eval_transform(picture, self.image_size)
            caption = choose(raw.members, self.caption_keys, self.caption_weights, None)
        else:
            image = train_transform(picture, self.image_size, self.augment, rng(self.seed, "augment", *named))
            drawing = rng(self.seed, "caption", *named)
            caption = choose(raw.members, self.caption_keys, self.caption_weights, drawing)
        if not caption:
            raise DataError(
                f"no caption under {', '.join(self.caption_keys)}; it has {', '.join(raw.members)}",
                slug="no-caption",
            )
        ids = tokenizer.encode(caption, self.text_length)
        return Item(image, ids, raw.key, caption, caption_hash(self._main_caption(raw) or caption))

    def _main_caption(self, raw: RawSample) -> str | None:
        """The caption that names the sample, whichever was drawn.

        Equal ones are not negatives of each other, and neither are two wordings of the same one.
        """
        return choose(raw.members, self.caption_keys[:1], self.caption_weights[:1], None)


def _picture(raw: RawSample) -> bytes:
    for extension, data in raw.members.items():
        if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
            return data
    raise DataError(f"no picture among its files: {', '.join(raw.members)}", slug="no-image")
