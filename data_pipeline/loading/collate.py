"""Items to tensors: pictures side by side, captions padded to the longest of the batch.

All numbers of a batch lie in one piece of memory, and every tensor is a view of it: a tensor that a
worker hands to the trainer costs a round of messages, whatever its size. In a worker that memory is
shared with the trainer from the start, so that pictures are decoded where the trainer will read
them; and it is lent: when the trainer holds no tensor of the batch any more, the worker fills it
again. Fresh pages would cost more than anything but decoding (7 ms for 64 pictures of 224 pixels).

    memory   [ pictures, most x 3 x s x s bytes | to 8 | int64: lengths, hashes, numbers, slots, ids, positions, lent ]
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from data_pipeline.content.recipe import Item
from data_pipeline.samples import Batch, SampleProblem

# Shapes: B pairs, S text positions, T valid text tokens.

TEXT_MULTIPLE = 8
"""S is a multiple of this, so that few different shapes reach the model."""


class PackedBatch(NamedTuple):
    """A batch on its way from a worker."""

    memory: Tensor
    """uint8: everything; see the module's text."""
    image_size: int
    first_number: int
    """Byte at which the int64 begin."""
    pairs: int
    width: int
    tokens: int
    keys: tuple[str, ...]
    captions: tuple[str, ...]
    problems: tuple[SampleProblem, ...]
    seconds: float
    is_lent: bool = False
    """Whether `memory` goes back to its worker after use; its last number is 1 until then."""

    def unpack(self) -> Batch:
        """The batch, as views of the memory."""
        pairs, size = self.pairs, self.image_size
        memory = self.memory
        if self.is_lent:
            # Every view of this tensor keeps the loan alive; the last one that goes ends it.
            memory = torch.from_numpy(np.asarray(_Loan(memory)))
        images = memory[: pairs * 3 * size * size].view(pairs, 3, size, size)
        counts = [pairs, pairs, pairs, pairs, pairs * self.width, self.tokens]
        numbers = memory[self.first_number :].view(torch.int64)[: sum(counts)]
        lengths_B, hashes_B, ids_B, slots_B, text_ids, positions_T = numbers.split(counts)
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
        )


class BatchRows:
    """A batch in the making: pictures are made at their place in it, one good item after the
    other."""

    def __init__(self, most: int, *, image_size: int, context_length: int, pad_id: int) -> None:
        """Make room for a batch.

        Args:
            most: Items at most.
            image_size: Side of the square pictures, pixels.
            context_length: Most text positions.
            pad_id: Fills up shorter captions.
        """
        picture_bytes = most * 3 * image_size * image_size
        self._first_number = -(-picture_bytes // 8) * 8
        self._memory, self._is_lent = _memory(
            self._first_number + 8 * most * (4 + 2 * context_length) + 8
        )
        self._images = self._memory[:picture_bytes].view(most, 3, image_size, image_size).numpy()
        self._size, self._text_length, self._pad_id = image_size, context_length, pad_id
        self._items: list[Item] = []
        self._numbers: list[int] = []
        self._slots: list[int] = []

    @property
    def place(self) -> np.ndarray:
        """Where the next picture goes, uint8 `[3, s, s]`; a picture that failed is written over."""
        place: np.ndarray = self._images[len(self._items)]
        return place

    def add(self, item: Item, number: int, slot: int) -> None:
        """Take one item.

        Args:
            item: Its picture was made at `place`.
            number: The sample's number over all shards.
            slot: Row of the sample among those that were asked for.
        """
        self._items.append(item)
        self._numbers.append(number)
        self._slots.append(slot)

    def packed(self, problems: Sequence[SampleProblem], seconds: float = 0.0) -> PackedBatch:
        """The batch of all items so far, in order; none at all gives tensors with `B = 0`.

        Args:
            problems: The samples that are missing, to be handed on.
            seconds: Time it took, to be handed on.
        """
        items, pairs = self._items, len(self._items)
        lengths_B = np.array([len(item.ids) for item in items], dtype=np.int64)
        longest = int(lengths_B.max(initial=1))
        width = min(self._text_length, -(-longest // TEXT_MULTIPLE) * TEXT_MULTIPLE)
        tokens = [token for item in items for token in item.ids]

        numbers = self._memory[self._first_number :].view(torch.int64).numpy()
        ends = np.cumsum([pairs, pairs, pairs, pairs, pairs * width, len(tokens)]).tolist()
        numbers[: ends[0]] = lengths_B
        numbers[ends[0] : ends[1]] = [item.caption_hash for item in items]
        numbers[ends[1] : ends[2]] = self._numbers
        numbers[ends[2] : ends[3]] = self._slots
        text_ids = numbers[ends[3] : ends[4]]
        text_ids[:] = self._pad_id
        positions_T = np.flatnonzero(np.arange(width) < lengths_B[:, None])
        text_ids[positions_T] = tokens
        numbers[ends[4] : ends[5]] = positions_T
        return PackedBatch(
            memory=self._memory,
            image_size=self._size,
            first_number=self._first_number,
            pairs=pairs,
            width=width,
            tokens=len(tokens),
            keys=tuple(item.key for item in items),
            captions=tuple(item.caption for item in items),
            problems=tuple(problems),
            seconds=seconds,
            is_lent=self._is_lent,
        )


class _Loan:
    """A worker's memory while the trainer reads it: an array made of this holds it until nobody
    reads on."""

    def __init__(self, memory: Tensor) -> None:
        self._lent = memory[-8:].view(torch.int64)
        self._pid = os.getpid()
        self.__array_interface__ = memory.numpy().__array_interface__

    def __del__(self) -> None:
        if os.getpid() == self._pid:  # a forked child forgets its copy while its parent still reads
            self._lent[0] = 0


MOST_KEPT_BYTES = 256 << 20
"""Memory that a worker keeps; what it needs beyond, because the trainer holds many batches, goes
back after use."""
_kept: list[Tensor] = []
"""Those of this worker."""


def _memory(count: int) -> tuple[Tensor, bool]:
    """`count` bytes, in a worker such as the trainer can see without a copy; and whether they are
    lent."""
    if get_worker_info() is None:
        return torch.empty(count, dtype=torch.uint8), False
    for kept in _kept:
        lent = kept[-8:].view(torch.int64)
        if len(kept) == count and not lent[0]:
            lent[0] = 1
            return kept, True
    # What torch's own collate function does in a worker.
    storage = torch.UntypedStorage._new_shared(count)
    made = torch.empty(0, dtype=torch.uint8).set_(storage)
    if sum(len(kept) for kept in _kept) + count > MOST_KEPT_BYTES:
        return made, False
    made[-8:].view(torch.int64)[0] = 1
    _kept.append(made)
    return made, True
