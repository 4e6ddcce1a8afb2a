"""Builds batches: images stacked, captions padded to the longest of the batch.

All arrays of a batch are views of a single buffer, because every tensor that a worker sends to the
trainer costs an exchange of messages, whatever its size. In a worker the buffer is in shared memory
from the start, so images are decoded directly to where the trainer reads them. Buffers are pooled:
when the trainer holds no tensor of the batch any more, the worker reuses its buffer. Newly mapped
memory would cost more than anything except decoding (7 ms for 64 images of 224 pixels).

    buffer   [ images: capacity x 3 x s x s bytes | padding to 8 bytes | int64: lengths, hashes,
               sample ids, slots, token ids, positions, in-use flag ]
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from data_pipeline.samples import Batch, ProcessedSample, SampleProblem

# Shapes: B pairs, S text positions, T valid text tokens.

TEXT_LENGTH_MULTIPLE = 8
"""S is a multiple of this, so that few different shapes reach the model."""


class PackedBatch(NamedTuple):
    """A batch as it is sent from a worker."""

    buffer: Tensor
    """uint8: all arrays; see the module docstring."""
    image_size: int
    int_offset: int
    """Byte offset of the int64 section."""
    pairs: int
    """B."""
    width: int
    """S."""
    tokens: int
    """T."""
    keys: tuple[str, ...]
    captions: tuple[str, ...]
    num_truncated: int
    all_captions: tuple[tuple[str, ...], ...]
    problems: tuple[SampleProblem, ...]
    seconds: float
    is_pooled: bool = False
    """Whether the worker reuses `buffer` after use; its last int64 is 1 until then."""

    def unpack(self) -> Batch:
        """The batch, as views of the buffer."""
        pairs, size = self.pairs, self.image_size
        buffer = self.buffer
        if self.is_pooled:
            # Every view of this tensor keeps the lease alive; the last one to be freed ends it.
            buffer = torch.from_numpy(np.asarray(_BufferLease(buffer)))

        images = buffer[: pairs * 3 * size * size].view(pairs, 3, size, size)
        counts = [pairs, pairs, pairs, pairs, pairs * self.width, self.tokens]
        integers = buffer[self.int_offset :].view(torch.int64)[: sum(counts)]
        lengths_B, hashes_B, ids_B, slots_B, text_ids, positions_T = integers.split(counts)
        return Batch(
            images=images,
            text_ids=text_ids.view(pairs, self.width),
            text_lengths=lengths_B,
            text_positions=positions_T,
            caption_hashes=hashes_B,
            keys=self.keys,
            captions=self.captions,
            problems=self.problems,
            seconds=self.seconds,
            ids=ids_B,
            slots=slots_B,
            num_truncated=self.num_truncated,
            all_captions=self.all_captions,
        )


class BatchBuilder:
    """A batch under construction; images are decoded into their place in its buffer."""

    def __init__(self, capacity: int, *, image_size: int, context_length: int, pad_id: int) -> None:
        """Allocate a batch.

        Args:
            capacity: Maximum number of samples.
            image_size: Side of the square images, pixels.
            context_length: Maximum number of text positions.
            pad_id: Token id that pads shorter captions.
        """
        image_bytes = capacity * 3 * image_size * image_size
        self._int_offset = -(-image_bytes // 8) * 8
        self._buffer, self._is_pooled = _allocate(
            self._int_offset + 8 * capacity * (4 + 2 * context_length) + 8
        )
        images = self._buffer[:image_bytes].view(capacity, 3, image_size, image_size)
        self._images = images.numpy()
        self._image_size, self._context_length, self._pad_id = image_size, context_length, pad_id
        self._samples: list[ProcessedSample] = []
        self._ids: list[int] = []
        self._slots: list[int] = []

    @property
    def image_slot(self) -> np.ndarray:
        """Where the next image is written, uint8 `[3, s, s]`; a failed image is overwritten."""
        slot: np.ndarray = self._images[len(self._samples)]
        return slot

    def add(self, sample: ProcessedSample, sample_id: int, slot: int) -> None:
        """Add a sample.

        Args:
            sample: Its image was written to `image_slot`.
            sample_id: Index of the sample over all shards.
            slot: Index of the sample among those that were requested for the batch.
        """
        self._samples.append(sample)
        self._ids.append(sample_id)
        self._slots.append(slot)

    def packed(self, problems: Sequence[SampleProblem], seconds: float = 0.0) -> PackedBatch:
        """The batch of all samples so far, in order; without samples its tensors have `B = 0`.

        Args:
            problems: The missing samples, for `Batch.problems`.
            seconds: Time spent on the batch, for `Batch.seconds`.
        """
        samples, pairs = self._samples, len(self._samples)
        lengths_B = np.array([len(sample.ids) for sample in samples], dtype=np.int64)
        longest = int(lengths_B.max(initial=1))
        rounded = -(-longest // TEXT_LENGTH_MULTIPLE) * TEXT_LENGTH_MULTIPLE
        width = min(self._context_length, rounded)
        tokens = [token for sample in samples for token in sample.ids]

        integers = self._buffer[self._int_offset :].view(torch.int64).numpy()
        ends = np.cumsum([pairs, pairs, pairs, pairs, pairs * width, len(tokens)]).tolist()
        integers[: ends[0]] = lengths_B
        integers[ends[0] : ends[1]] = [sample.caption_hash for sample in samples]
        integers[ends[1] : ends[2]] = self._ids
        integers[ends[2] : ends[3]] = self._slots
        text_ids = integers[ends[3] : ends[4]]
        text_ids[:] = self._pad_id
        positions_T = np.flatnonzero(np.arange(width) < lengths_B[:, None])
        text_ids[positions_T] = tokens
        integers[ends[4] : ends[5]] = positions_T

        return PackedBatch(
            buffer=self._buffer,
            image_size=self._image_size,
            int_offset=self._int_offset,
            pairs=pairs,
            width=width,
            tokens=len(tokens),
            keys=tuple(sample.key for sample in samples),
            captions=tuple(sample.caption for sample in samples),
            num_truncated=sum(sample.is_truncated for sample in samples),
            all_captions=tuple(sample.all_captions for sample in samples if sample.all_captions),
            problems=tuple(problems),
            seconds=seconds,
            is_pooled=self._is_pooled,
        )


class _BufferLease:
    """The trainer's use of a worker's buffer: an array made from this object keeps it alive, and
    its deletion marks the buffer as free."""

    def __init__(self, buffer: Tensor) -> None:
        self._in_use = buffer[-8:].view(torch.int64)
        self._pid = os.getpid()
        self.__array_interface__ = buffer.numpy().__array_interface__

    def __del__(self) -> None:
        # A forked child deletes its copy while the parent still reads the buffer.
        if os.getpid() == self._pid:
            self._in_use[0] = 0


MAX_POOL_BYTES = 256 << 20
"""Maximum size of a worker's pool; buffers beyond it (the trainer holds many batches) are freed
after use."""
_pool: list[Tensor] = []
"""Buffers of this worker."""


def _allocate(num_bytes: int) -> tuple[Tensor, bool]:
    """A buffer, and whether it is pooled; in a worker, in memory shared with the trainer."""
    if get_worker_info() is None:
        return torch.empty(num_bytes, dtype=torch.uint8), False

    for buffer in _pool:
        in_use = buffer[-8:].view(torch.int64)
        if len(buffer) == num_bytes and not in_use[0]:
            in_use[0] = 1
            return buffer, True

    # As in torch's default collate function in a worker.
    storage = torch.UntypedStorage._new_shared(num_bytes)
    buffer = torch.empty(0, dtype=torch.uint8).set_(storage)
    if sum(len(pooled) for pooled in _pool) + num_bytes > MAX_POOL_BYTES:
        return buffer, False
    buffer[-8:].view(torch.int64)[0] = 1
    _pool.append(buffer)
    return buffer, True
