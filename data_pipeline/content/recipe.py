"""From a sample's files to what a batch is made of: choose a caption, filter, decode, transform,
tokenize.

Everything random comes from numbers that belong to the sample (seed, epoch, shard, key), so a
sample looks the same on whichever rank or worker it is read, today and after a restart. What is
cheap comes first: a sample that is left out by its caption, its fields or its picture's header is
never decoded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from data_pipeline.common.errors import DataError
from data_pipeline.content import colors
from data_pipeline.content.captions import Texts, check_key, choose, clean_hash
from data_pipeline.content.draws import draws
from data_pipeline.content.filters import (
    Condition,
    check_fields,
    check_size,
    compile_conditions,
    fits,
    unfit_caption,
)
from data_pipeline.content.headers import Header, read_header
from data_pipeline.content.images import check_pixels, decode_pixels
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.content.transforms import planes, render, train_background
from data_pipeline.content.views import central_view, least_pixels, reduced_view, train_view
from data_pipeline.samples import RawSample
from data_pipeline.settings import AugmentConfig, FilterConfig, LimitConfig

# Shapes: s the side of the model's pictures.

IMAGE_EXTENSIONS = frozenset(
    (
        "jpg",
        "jpeg",
        "png",
        "webp",
        "bmp",
        "gif",
        "tif",
        "tiff",
        "ppm",
        "jp2",
        "avif",
        "img",
        "image",
    )
)
"""Members that may hold the picture; what it really is shows in its content. Any other member that
is neither text nor JSON is never looked at."""

_CAPTION_DRAWS = slice(12, 14)
"""Of a sample's numbers: the first twelve are the picture's."""


class Item(NamedTuple):
    """One good sample, ready for a batch."""

    image_CHW: np.ndarray
    """uint8 `[3, s, s]`."""
    ids: list[int]
    key: str
    caption: str
    caption_hash: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How items are made."""

    image_size: int
    """Side of the square picture, pixels."""
    context_length: int
    """Most text positions, marks included."""
    caption_keys: tuple[str, ...]
    caption_weights: tuple[float, ...]
    seed: int = 0
    augment: AugmentConfig | None = None
    """Changes to training pictures; None is evaluation: nothing is drawn, the first caption is
    used."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Samples that are left out."""
    limits: LimitConfig = field(default_factory=LimitConfig)
    """What a sample may ask for at most."""

    def __post_init__(self) -> None:
        for key in self.caption_keys:
            check_key(key)
        _ = self._conditions  # so that a bad one is found now

    def make(
        self, raw: RawSample, epoch: int, tokenizer: Tokenizer, out: np.ndarray | None = None
    ) -> Item:
        """The item of one sample in one epoch.

        Args:
            raw: The sample.
            epoch: How often it came before.
            tokenizer: For the caption.
            out: uint8 `[3, s, s]`, contiguous, such as a picture's place in a batch: the picture is
                written there, and is the item's `image_CHW`. After an error its contents are
                undefined.

        Raises:
            DataError: With a slug (`no-image`, `bad-image`, `no-caption`, `bad-json`,
            `filter:...`):
                this sample cannot be used, or is left out.
        """
        drawn = draws(b"sample", self.seed, epoch, raw.shard, raw.key) if self.augment else None
        texts = Texts(raw.members, self.limits)
        if self._conditions:
            check_fields(texts.fields(), self._conditions)
        caption = self._caption(raw, texts, drawn)
        data = picture_of(raw)
        header = read_header(data)
        check_pixels(header, self.limits.pixels)
        check_size(header.width, header.height, self.filters)
        image = (
            self._view(data, header, out)
            if drawn is None
            else self._train(raw, epoch, data, header, drawn, out)
        )
        # Equal captions are not negatives of each other, and neither are two wordings of the same:
        # the first one names the sample, whichever was drawn.
        names = texts.find(self.caption_keys[0])
        ids = tokenizer.encode_clean(caption, self.context_length)
        return Item(image, ids, raw.key, caption, clean_hash(names[0] if names else caption))

    def _caption(self, raw: RawSample, texts: Texts, drawn: list[float] | None) -> str:
        pair = drawn[_CAPTION_DRAWS] if drawn else None
        limited = self.filters.min_caption_chars or self.filters.max_caption_chars
        fitting = (lambda text: fits(text, self.filters)) if limited else None
        caption = choose(texts, self.caption_keys, self.caption_weights, pair, fitting)
        if caption:
            return caption
        unfit = choose(texts, self.caption_keys, self.caption_weights, None)
        if unfit:
            raise unfit_caption(unfit, self.filters)
        raise DataError(
            f"no caption under {', '.join(self.caption_keys)}; it has {', '.join(raw.members)}",
            slug="no-caption",
        )

    def _view(self, data: bytes, header: Header, out: np.ndarray | None) -> np.ndarray:
        pixels, _ = decode_pixels(data, header)
        return planes(
            render(pixels, central_view(header.width, header.height), self.image_size), out
        )

    def _train(
        self,
        raw: RawSample,
        epoch: int,
        data: bytes,
        header: Header,
        drawn: list[float],
        out: np.ndarray | None,
    ) -> np.ndarray:
        assert self.augment is not None
        view = train_view(header.width, header.height, self.augment, drawn)
        enough = least_pixels(view, header.width, header.height, self.image_size)
        pixels, reduced = decode_pixels(data, header, enough)
        if reduced != 1:
            view = reduced_view(view, reduced, header.width, header.height)
        background = train_background(pixels, self.augment, drawn)
        square = render(pixels, view, self.image_size, background=background)
        if self._has_jitter:
            named = draws(b"colour", self.seed, epoch, raw.shard, raw.key)
            square = colors.jitter(square, self.augment, named)
        return planes(square, out)

    @cached_property
    def _conditions(self) -> tuple[Condition, ...]:
        return compile_conditions(self.filters.require)

    @cached_property
    def _has_jitter(self) -> bool:
        return self.augment is not None and colors.is_on(self.augment)


def picture_of(raw: RawSample) -> bytes:
    """The sample's picture file: its first member with the name of one.

    Raises:
        DataError: There is none (slug `no-image`).
    """
    for extension, data in raw.members.items():
        if extension in IMAGE_EXTENSIONS or extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
            return data
    raise DataError(f"no picture among its files: {', '.join(raw.members)}", slug="no-image")
