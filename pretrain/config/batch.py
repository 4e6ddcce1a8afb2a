"""How one optimizer step is cut into ranks and micro-batches: exactly, or not at all.

People write the pairs of a step and the pairs of a forward pass; accumulation follows. All ranks
are data ranks: the ranks that share one copy of the experts each read their own pairs.
"""

from __future__ import annotations

from typing import NamedTuple

from data_pipeline.common.errors import ConfigError


class BatchPlan(NamedTuple):
    """The one place that knows how many micro-batches a step has."""

    global_batch_size: int
    """Pairs of one optimizer step, whole world."""
    micro_batch_size: int
    """Pairs of one forward pass of one rank."""
    data_ranks: int
    """Ranks that read data: all of them."""
    accumulation_steps: int
    """Forward passes of a rank in one optimizer step."""


def plan_batch(global_batch_size: int, micro_batch_size: int, data_ranks: int) -> BatchPlan:
    """Split the pairs of one optimizer step over ranks and micro-batches.

    Args:
        global_batch_size: Pairs of one optimizer step, whole world.
        micro_batch_size: Pairs of one forward pass of one rank.
        data_ranks: Ranks of the run.

    Raises:
        ConfigError: The split is not exact; names the nearest `global_batch_size` that is, and the
        nearest
            `micro_batch_size` that keeps the step.
    """
    if min(global_batch_size, micro_batch_size, data_ranks) < 1:
        raise ConfigError(
            f"batch.global_batch_size ({global_batch_size}), batch.micro_batch_size ({micro_batch_size}) and the "
            f"number of ranks ({data_ranks}) must all be at least 1"
        )
    pairs_per_round = micro_batch_size * data_ranks
    accumulation_steps, rest = divmod(global_batch_size, pairs_per_round)
    if rest or accumulation_steps == 0:
        nearest = max(1, round(global_batch_size / pairs_per_round)) * pairs_per_round
        raise ConfigError(
            f"batch.global_batch_size is {global_batch_size}, not a positive multiple of batch.micro_batch_size "
            f"({micro_batch_size}) x {data_ranks} ranks = {pairs_per_round}; the nearest that is: "
            f"batch.global_batch_size={nearest}{_or_keep_the_step(global_batch_size, micro_batch_size, data_ranks)}"
        )
    return BatchPlan(global_batch_size, micro_batch_size, data_ranks, accumulation_steps)


def _or_keep_the_step(global_batch_size: int, micro_batch_size: int, data_ranks: int) -> str:
    """The nearest `micro_batch_size` that leaves the step as it is, if there is one."""
    share, rest = divmod(global_batch_size, data_ranks)
    if rest:
        return ""
    divisors = [n for n in range(1, share + 1) if share % n == 0] if share <= 1 << 20 else []
    if not divisors:
        return ""
    best = min(divisors, key=lambda n: (abs(n - micro_batch_size), n))
    return f", or batch.micro_batch_size={best}"
