"""Split of an optimizer step into micro-batches: exact, or an error.

The pairs per step and the pairs of a micro-batch are configured; the number of micro-batches
follows from the number of ranks. All ranks are data-parallel.
"""

from __future__ import annotations

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.tables import counted

_MAX_SEARCHED = 1 << 20
"""Pairs per rank up to which a valid micro-batch size is searched for an error message."""


def micro_batches_per_step(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Number of micro-batches per rank and step.

    Args:
        global_batch_size: Pairs per step, over all ranks.
        micro_batch_size: Pairs of one micro-batch of one rank.
        world_size: Number of ranks.

    Raises:
        ConfigError: The split is not exact. The message gives the nearest valid
            `global_batch_size` and, if there is one, the nearest `micro_batch_size` that keeps the
            global batch size.
    """
    if min(global_batch_size, micro_batch_size, world_size) < 1:
        raise ConfigError(
            f"batch.global_batch_size ({global_batch_size}), batch.micro_batch_size "
            f"({micro_batch_size}) and the number of ranks ({world_size}) must all be >= 1"
        )

    round_size = micro_batch_size * world_size
    count, remainder = divmod(global_batch_size, round_size)
    if remainder or count == 0:
        nearest = max(1, round(global_batch_size / round_size)) * round_size
        message = (
            f"batch.global_batch_size is {global_batch_size}, not a positive multiple of "
            f"batch.micro_batch_size ({micro_batch_size}) x {counted(world_size, 'rank')} = "
            f"{round_size}; use batch.global_batch_size={nearest}"
        )
        micro = _nearest_micro_batch_size(global_batch_size, micro_batch_size, world_size)
        raise ConfigError(
            message if micro is None else f"{message}, or batch.micro_batch_size={micro}"
        )
    return count


def largest_micro_batch_size(global_batch_size: int, world_size: int) -> int:
    """Pairs of the only micro-batch of a rank in a step.

    Raises:
        ConfigError: The global batch size is not a positive multiple of the number of ranks.
    """
    size = max(1, global_batch_size // max(1, world_size))
    micro_batches_per_step(global_batch_size, size, world_size)
    return size


def micro_batch_positions(
    step_position: int, micro: int, rank: int, *, micro_batch_size: int, world_size: int
) -> range:
    """Positions of one rank's micro-batch.

    The global batch of a step is divided into rounds of `world_size` micro-batches, in rank order,
    so the union over ranks is the same for any world size.

    Args:
        step_position: First position of the step.
        micro: Index of the micro-batch in the step.
        rank: Rank.
        micro_batch_size: Pairs per micro-batch.
        world_size: Number of ranks.
    """
    first = step_position + (micro * world_size + rank) * micro_batch_size
    return range(first, first + micro_batch_size)


def _nearest_micro_batch_size(
    global_batch_size: int, micro_batch_size: int, world_size: int
) -> int | None:
    """The nearest `micro_batch_size` that is valid for the global batch size, if there is one."""
    pairs_per_rank, remainder = divmod(global_batch_size, world_size)
    if remainder or not 1 <= pairs_per_rank <= _MAX_SEARCHED:
        return None
    divisors = [n for n in range(1, pairs_per_rank + 1) if pairs_per_rank % n == 0]
    return min(divisors, key=lambda n: (abs(n - micro_batch_size), n))
