"""Processes a sample for a batch: caption selection, filters, decoding, augmentation, tokens.

All random numbers are derived from (seed, epoch, shard, key), so a sample is processed identically
on any rank or worker and after a restart. Cheap steps come first: a sample that is rejected by its
caption, its fields or its image header is never decoded.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from data_pipeline.content.captions import (
    SampleTexts,
    check_caption_key,
    hash_clean_caption,
    no_caption_error,
    select_caption,
)
from data_pipeline.content.filters import (
    Condition,
    caption_length_allowed,
    caption_length_error,
    check_fields,
    check_image_size,
    parse_conditions,
)
from data_pipeline.content.image import (
    ImageHeader,
    check_pixels,
    color_jitter_enabled,
    eval_image,
    read_header,
    train_image,
    uniform_numbers,
)
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.sample_keys import IMAGE_KEYS, check_image_keys, image_bytes
from data_pipeline.samples import ProcessedSample, RawSample
from data_pipeline.settings import AugmentConfig, FilterConfig, ImageMode, LimitConfig

# Shapes: C image channels, H and W height and width of the model's input (both `image_size`).

_CAPTION_UNIFORMS = slice(12, 14)
"""The first twelve of a sample's random numbers are for the image."""


@dataclass(frozen=True, kw_only=True)
class SampleProcessor:
    """Converts raw samples to processed samples."""

    image_size: int
    """Side of the model's input, pixels."""
    context_length: int
    """Maximum number of token ids, including start and end."""
    caption_keys: tuple[str, ...]
    caption_weights: tuple[float, ...]
    image_keys: tuple[str, ...] = IMAGE_KEYS
    image_mode: ImageMode = "crop"
    seed: int = 0
    augment: AugmentConfig | None = None
    """Augmentation for training; None for evaluation: nothing is random and the first caption is
    used."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    limits: LimitConfig = field(default_factory=LimitConfig)

    def __post_init__(self) -> None:
        for key in self.caption_keys:
            check_caption_key(key)
        check_image_keys(self.image_keys)
        _ = self._conditions  # reports a syntax error in a condition now

    def process(
        self, raw: RawSample, epoch: int, tokenizer: Tokenizer, out: np.ndarray | None = None
    ) -> ProcessedSample:
        """Process one sample for one epoch.

        Args:
            raw: The sample.
            epoch: Number of times that the sample was used before.
            tokenizer: Tokenizer for the caption.
            out: Contiguous uint8 `[C, H, W]`, such as a slot of a batch, into which the image is
                written; it becomes `image_CHW`. Its contents are undefined after an error.

        Raises:
            DataError: The sample cannot be used or is filtered out; `slug` gives the reason
                (`no-image`, `several-images`, `several-samples`, `corrupt-image`,
                `no-caption`, `invalid-json`, `filter:...`).
        """
        uniforms = None
        if self.augment:
            uniforms = uniform_numbers(b"sample", self.seed, epoch, raw.shard, raw.key)

        texts = SampleTexts(raw.members, self.limits)
        if self._conditions:
            check_fields(texts.fields(), self._conditions)
        caption = self._select_caption(raw, texts, uniforms)

        data = image_bytes(raw, self.image_keys)
        header = read_header(data)
        check_pixels(header, self.limits.pixels)
        check_image_size(header.width, header.height, self.filters)
        if uniforms is None:
            image = eval_image(data, header, self.image_size, self.image_mode, out=out)
        else:
            image = self._train_image(raw, epoch, data, header, uniforms, out)

        # Alternative captions of one sample must have the same hash too, so the first caption is
        # hashed whichever was selected.
        captions = texts.find_captions(self.caption_keys[0])
        caption_hash = hash_clean_caption(captions[0] if captions else caption)
        ids, is_truncated = tokenizer.encode_truncated(caption, self.context_length)
        found = () if uniforms else self._all_captions(texts)
        return ProcessedSample(image, ids, raw.key, caption, caption_hash, is_truncated, found)

    def _select_caption(
        self, raw: RawSample, texts: SampleTexts, uniforms: list[float] | None
    ) -> str:
        caption = select_caption(
            texts,
            self.caption_keys,
            self.caption_weights,
            uniforms[_CAPTION_UNIFORMS] if uniforms else None,
            lambda text: caption_length_allowed(text, self.filters),
        )
        if caption:
            return caption

        rejected = select_caption(texts, self.caption_keys, self.caption_weights, None)
        if rejected:
            raise caption_length_error(rejected, self.filters)
        raise no_caption_error(raw.members, self.caption_keys)

    def _all_captions(self, texts: SampleTexts) -> tuple[str, ...]:
        captions = (texts.find_captions(key) for key in self.caption_keys)
        return tuple(itertools.chain.from_iterable(captions))

    def _train_image(
        self,
        raw: RawSample,
        epoch: int,
        data: bytes,
        header: ImageHeader,
        uniforms: list[float],
        out: np.ndarray | None,
    ) -> np.ndarray:
        assert self.augment is not None
        color_uniforms: list[float] = []
        if self._has_color_jitter:
            # The purpose strings select the random numbers: changing one changes training results.
            color_uniforms = uniform_numbers(b"colour", self.seed, epoch, raw.shard, raw.key)
        return train_image(
            data,
            header,
            self.image_size,
            self.augment,
            uniforms,
            mode=self.image_mode,
            color_uniforms=color_uniforms,
            out=out,
        )

    @cached_property
    def _conditions(self) -> tuple[Condition, ...]:
        return parse_conditions(self.filters.require)

    @cached_property
    def _has_color_jitter(self) -> bool:
        return self.augment is not None and color_jitter_enabled(self.augment)
