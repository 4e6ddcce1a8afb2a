"""Split of an optimizer step into micro-batches: exact, or an error.

The global and the micro-batch size are configured; the number of accumulation steps follows. All
ranks are data-parallel: the ranks of one expert-parallel group read different pairs.
"""

from __future__ import annotations

from typing import NamedTuple

from data_pipeline.common.errors import ConfigError


class BatchPlan(NamedTuple):
    """Batch sizes of a run on a given number of ranks."""

    global_batch_size: int
    """Pairs per optimizer step, over all ranks."""
    micro_batch_size: int
    """Pairs per forward pass of one rank."""
    data_parallel_size: int
    """Number of ranks that read data: all of them."""
    accumulation_steps: int
    """Forward passes of a rank per optimizer step."""


def plan_batch(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> BatchPlan:
    """Split the pairs of one optimizer step over ranks and micro-batches.

    Args:
        global_batch_size: Pairs per optimizer step, over all ranks.
        micro_batch_size: Pairs per forward pass of one rank.
        data_parallel_size: Number of ranks.

    Raises:
        ConfigError: The split is not exact. The message gives the nearest valid
            `global_batch_size` and, if there is one, the nearest `micro_batch_size` that keeps the
            global batch size.
    """
    if min(global_batch_size, micro_batch_size, data_parallel_size) < 1:
        raise ConfigError(
            f"batch.global_batch_size ({global_batch_size}), batch.micro_batch_size "
            f"({micro_batch_size}) and the number of ranks ({data_parallel_size}) must all be >= 1"
        )

    pairs_per_forward = micro_batch_size * data_parallel_size
    accumulation_steps, remainder = divmod(global_batch_size, pairs_per_forward)
    if remainder or accumulation_steps == 0:
        nearest = max(1, round(global_batch_size / pairs_per_forward)) * pairs_per_forward
        message = (
            f"batch.global_batch_size is {global_batch_size}, not a positive multiple of "
            f"batch.micro_batch_size ({micro_batch_size}) x {data_parallel_size} ranks = "
            f"{pairs_per_forward}; use batch.global_batch_size={nearest}"
        )
        micro = _nearest_micro_batch_size(global_batch_size, micro_batch_size, data_parallel_size)
        raise ConfigError(
            message if micro is None else f"{message}, or batch.micro_batch_size={micro}"
        )
    return BatchPlan(global_batch_size, micro_batch_size, data_parallel_size, accumulation_steps)


def _nearest_micro_batch_size(
    global_batch_size: int, micro_batch_size: int, data_parallel_size: int
) -> int | None:
    """The nearest `micro_batch_size` that is valid for the global batch size, if there is one."""
    pairs_per_rank, remainder = divmod(global_batch_size, data_parallel_size)
    # The bound keeps the search for divisors fast.
    if remainder or not 1 <= pairs_per_rank <= 1 << 20:
        return None
    divisors = [n for n in range(1, pairs_per_rank + 1) if pairs_per_rank % n == 0]
    return min(divisors, key=lambda n: (abs(n - micro_batch_size), n))
