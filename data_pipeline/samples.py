"""The nouns of the pipeline: a sample as it lies in a shard, a bad one, and a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SampleRef(NamedTuple):
    """Which sample comes at some position of training."""

    epoch: int
    shard: int
    """Index into the shards of all manifests, in order."""
    sample: int
    """Index in the shard."""


class RawSample(NamedTuple):
    """A sample as it lies in its shard: the files that share a key."""

    shard: str
    key: str
    members: dict[str, bytes]
    """Contents by extension in lower case, e.g. `{"jpg": ..., "txt": ...}`, in the shard's
    order."""


class SampleProblem(NamedTuple):
    """A sample that could not be used, and why."""

    shard: str
    key: str
    reason: str
    """One word by which they are counted: `crc-mismatch`, `bad-image`, `no-caption` ..."""
    detail: str
    id: int = -1
    """Number of the sample over all shards of all manifests, in order; -1 where that is not
    known."""

    @property
    def is_filtered(self) -> bool:
        """Whether it was left out on purpose: by a filter, not because it is bad."""
        return self.reason.startswith("filter:")


class Batch(NamedTuple):
    """One rank's micro-batch.

    Bad samples are absent from the tensors and named in `problems`, so `B` may be less than was
    asked for, even 0. Shapes: B pairs, S text positions, T valid text tokens.
    """

    images: Tensor
    """uint8 `[B, 3, height, width]`."""
    text_ids: Tensor
    """int64 `[B, S]`: start, caption, end, then padding. S is the longest of the batch, rounded up
    to a multiple of 8 (at most the text length that was asked for)."""
    text_lengths: Tensor
    """int64 `[B]`: valid tokens of each caption, both marks included."""
    text_positions: Tensor
    """int64 `[T]`: flat indices `b * S + s` of the valid tokens, rising."""
    caption_hashes: Tensor
    """int64 `[B]`: equal for captions that differ at most in capitals and blanks."""
    keys: tuple[str, ...]
    captions: tuple[str, ...]
    problems: tuple[SampleProblem, ...]
    seconds: float
    """Time it took to make."""
    ids: Tensor = torch.empty(0, dtype=torch.int64)
    """int64 `[B]`: number of each sample, counted over all shards of all manifests in order; none
    in a batch that was not read from shards."""
    slots: Tensor = torch.empty(0, dtype=torch.int64)
    """int64 `[B]`: row of each sample in the micro-batch as it was asked for, rising; bad samples
    leave gaps."""
