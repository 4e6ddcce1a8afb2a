"""The shape of a batch, and the rank that it is for."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """Size of a micro-batch and of its samples."""

    image_size: int
    """Side of the square images, pixels."""
    context_length: int
    """Maximum number of text positions, start and end tokens included."""
    micro_batch_size: int
    """Slots for pairs; skipped samples leave a slot unused."""

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ConfigError: A size is too small.
        """
        for name, least in (("image_size", 1), ("context_length", 2), ("micro_batch_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """Rank of this process, and number of processes that share the data."""

    rank: int = 0
    """From 0."""
    world_size: int = 1

    def __post_init__(self) -> None:
        """Check the rank: with a wrong one, samples would be read twice or not at all.

        Raises:
            ConfigError: It is not in 0..world_size - 1.
        """
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(
                f"rank is {self.rank}, but ranks are numbered from 0 to world_size - 1 "
                f"({self.world_size - 1})"
            )


SINGLE_RANK = RankInfo()
