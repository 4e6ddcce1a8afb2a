"""How one optimizer step is cut into ranks and micro-batches: exactly, or not at all.

People write the pairs of a step and the pairs of a forward pass; accumulation follows. All ranks are
data ranks: the ranks that share one copy of the experts each read their own pairs.
"""

from __future__ import annotations

from typing import NamedTuple

from data_pipeline.common.errors import ConfigError


class BatchPlan(NamedTuple):
    """The one place that knows how many micro-batches a step has."""

    pairs_per_step: int
    """Pairs of one optimizer step, whole world."""
    pairs_per_forward: int
    """Pairs of one forward pass of one rank."""
    data_ranks: int
    """Ranks that read data: all of them."""
    accumulation_steps: int
    """Forward passes of a rank in one optimizer step."""


def plan_batch(pairs_per_step: int, pairs_per_forward: int, data_ranks: int) -> BatchPlan:
    """Split the pairs of one optimizer step over ranks and micro-batches.

    Args:
        pairs_per_step: Pairs of one optimizer step, whole world.
        pairs_per_forward: Pairs of one forward pass of one rank.
        data_ranks: Ranks of the run.

    Raises:
        ConfigError: The split is not exact; names the nearest `pairs_per_step` that is, and the nearest
            `pairs_per_forward` that keeps the step.
    """
    if min(pairs_per_step, pairs_per_forward, data_ranks) < 1:
        raise ConfigError(
            f"batch.pairs_per_step ({pairs_per_step}), batch.pairs_per_forward ({pairs_per_forward}) and the "
            f"number of ranks ({data_ranks}) must all be at least 1"
        )
    pairs_per_round = pairs_per_forward * data_ranks
    accumulation_steps, rest = divmod(pairs_per_step, pairs_per_round)
    if rest or accumulation_steps == 0:
        nearest = max(1, round(pairs_per_step / pairs_per_round)) * pairs_per_round
        raise ConfigError(
            f"batch.pairs_per_step is {pairs_per_step}, not a positive multiple of batch.pairs_per_forward "
            f"({pairs_per_forward}) x {data_ranks} ranks = {pairs_per_round}; the nearest that is: "
            f"batch.pairs_per_step={nearest}{_or_keep_the_step(pairs_per_step, pairs_per_forward, data_ranks)}"
        )
    return BatchPlan(pairs_per_step, pairs_per_forward, data_ranks, accumulation_steps)


def _or_keep_the_step(pairs_per_step: int, pairs_per_forward: int, data_ranks: int) -> str:
    """The nearest `pairs_per_forward` that leaves the step as it is, if there is one."""
    share, rest = divmod(pairs_per_step, data_ranks)
    if rest:
        return ""
    divisors = [n for n in range(1, share + 1) if share % n == 0] if share <= 1 << 20 else []
    if not divisors:
        return ""
    best = min(divisors, key=lambda n: (abs(n - pairs_per_forward), n))
    return f", or batch.pairs_per_forward={best}"
