"""The shape of a batch, and the rank that it is for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """Size of a micro-batch and of its samples."""

    image_size: int
    """Side of the square images, pixels."""
    context_length: int
    """Maximum number of text positions, start and end tokens included."""
    micro_batch_size: int
    """Slots for pairs; skipped samples leave a slot unused."""


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """Rank of this process, and number of processes that share the data."""

    rank: int = 0
    world_size: int = 1


SINGLE_RANK = RankInfo()
