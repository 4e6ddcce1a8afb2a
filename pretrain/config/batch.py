"""Batch sizes of a run. The global and the micro-batch size are configured; the number of
accumulation steps follows."""

from __future__ import annotations

from typing import NamedTuple

from data_pipeline.order.micro_batches import micro_batches_per_step


class BatchPlan(NamedTuple):
    """Batch sizes of a run on a given number of ranks."""

    global_batch_size: int
    """Pairs per optimizer step, over all ranks."""
    micro_batch_size: int
    """Pairs per forward pass of one rank."""
    data_parallel_size: int
    """Number of ranks that read data: all of them, as the ranks of one expert-parallel group read
    different pairs."""
    accumulation_steps: int
    """Forward passes of a rank per optimizer step."""


def plan_batch(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> BatchPlan:
    """Split the pairs of one optimizer step over ranks and micro-batches.

    Args:
        global_batch_size: Pairs per optimizer step, over all ranks.
        micro_batch_size: Pairs per forward pass of one rank.
        data_parallel_size: Number of ranks.

    Raises:
        ConfigError: The split is not exact, see `micro_batches_per_step`.
    """
    accumulation_steps = micro_batches_per_step(
        global_batch_size, micro_batch_size, data_parallel_size
    )
    return BatchPlan(global_batch_size, micro_batch_size, data_parallel_size, accumulation_steps)
