"""The forms of a sample from the order to a batch, and the batch.

    SampleRef        which sample: from the order to the reader
    RawSample        its files, as they are stored in its shard
    ProcessedSample  its image and token ids, as they are put into a batch
    Batch            the samples of one rank's micro-batch

A sample that is skipped on the way becomes a `SampleProblem`, which is in the batch too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class SampleRef(NamedTuple):
    """Which sample, in which epoch: the one at a position of the training order."""

    epoch: int
    shard: int
    """Index into the shards of all manifests, in order."""
    sample: int
    """Index in the shard."""


class RawSample(NamedTuple):
    """A sample as it is stored in its shard: the files that have the same key."""

    shard: str
    key: str
    members: dict[str, bytes]
    """Contents by extension in lower case, e.g. `{"jpg": ..., "txt": ...}`, in the order of the
    shard."""


class ProcessedSample(NamedTuple):
    """One sample, ready for a batch. Shapes: C image channels, H and W size of the image."""

    image_CHW: np.ndarray
    """uint8."""
    ids: list[int]
    """Token ids, including start and end."""
    key: str
    caption: str
    caption_hash: int
    """Hash of the sample's first caption; equal captions are not used as negatives."""
    is_truncated: bool = False
    """Whether the caption has more tokens than the context length."""
    all_captions: tuple[str, ...] = ()
    """In evaluation: the captions under all keys; the first one is `caption`."""


class SampleProblem(NamedTuple):
    """A skipped sample and the reason."""

    shard: str
    key: str
    reason: str
    """Machine-readable reason by which samples are counted: `crc-mismatch`, `corrupt-image`,
    `no-caption`, ..."""
    detail: str
    """Description for messages."""
    id: int = -1
    """Index of the sample over all shards of all manifests, in order; -1 if unknown."""

    @property
    def is_filtered(self) -> bool:
        """Whether a filter skipped it; otherwise it is corrupt."""
        return self.reason.startswith("filter:")


class Batch(NamedTuple):
    """One rank's micro-batch.

    Skipped samples are not in the tensors but in `problems`, so `B` can be smaller than the
    micro-batch size, even 0. Shapes: B pairs, S text positions, T valid text tokens.
    """

    images: Tensor
    """uint8 `[B, 3, height, width]`."""
    text_ids: Tensor
    """int64 `[B, S]`: start token, caption, end token, then padding. S is the longest length in the
    batch, rounded up to a multiple of 8, at most the context length."""
    text_lengths: Tensor
    """int64 `[B]`: valid tokens of each caption, including start and end token."""
    text_positions: Tensor
    """int64 `[T]`: flat indices `b * S + s` of the valid tokens, increasing."""
    caption_hashes: Tensor
    """int64 `[B]`: equal for captions that differ only in upper and lower case and whitespace."""
    keys: tuple[str, ...]
    captions: tuple[str, ...]
    problems: tuple[SampleProblem, ...]
    seconds: float
    """Time to create the batch."""
    ids: Tensor = torch.empty(0, dtype=torch.int64)
    """int64 `[B]`: index of each sample over all shards of all manifests, in order; empty for a
    batch that was not read from shards."""
    slots: Tensor = torch.empty(0, dtype=torch.int64)
    """int64 `[B]`: index of each sample in the full micro-batch, increasing; slots of skipped
    samples are missing."""
    num_truncated: int = 0
    """Captions that have more tokens than the context length."""
    all_captions: tuple[tuple[str, ...], ...] = ()
    """In evaluation: all captions of each sample; the first one is in `captions`. Without elements
    in training, where one caption is selected."""
