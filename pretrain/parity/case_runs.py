"""The run configuration of a case, its missing rows, and the reasons why a case is unsupported."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from data_pipeline.common.errors import ConfigError
from pretrain.config.schema import BatchConfig, PrecisionConfig, RunConfig
from pretrain.config.validate import problems, vocabulary_problems
from pretrain.parity.cases import Case, stage_of


def min_global_batch_size(cases: Iterable[Case], run: RunConfig, world_size: int) -> int:
    """Pairs of the smallest global batch that all these cases can split.

    Each micro-batch of each rank gets one capacity group, or two pairs without expert capacity.
    """
    counts = [case.accumulation for case in cases]
    unit = run.moe.capacity_group_size if run.moe.capacity_factor else 2
    return world_size * unit * math.lcm(1, *counts)


def run_for_case(run: RunConfig, case: Case, world_size: int, pairs: int) -> RunConfig:
    """The run with the case's settings; `pairs` must be a multiple of world size x accumulation."""
    loss = run.loss
    if case.terms == "aux":
        loss = replace(loss, contrastive_weight=0.0, caption_weight=0.0)
    micro_batch_size = pairs // (world_size * case.accumulation)

    return replace(
        run,
        loss=loss,
        model=replace(run.model, activation_checkpointing=case.recompute),
        batch=BatchConfig(global_batch_size=pairs, micro_batch_size=micro_batch_size),
        precision=PrecisionConfig(compute=case.precision),
        parallel=replace(
            run.parallel,
            engine="deepspeed",
            expert_parallel_size=case.expert_parallel_size,
            deepspeed=case.profile,
        ),
    )


def unsupported_reason(run: RunConfig, case: Case, world_size: int, pairs: int) -> str:
    """Why a case cannot run; empty if it can."""
    unit = world_size * case.accumulation
    if pairs % unit:
        return (
            f"{pairs} pairs do not split into {world_size} ranks x {case.accumulation} "
            f"micro-batches; use a multiple of {unit} pairs"
        )
    if case.missing == "rank" and world_size == 1 and case.accumulation == 1:
        return "missing=rank would remove every pair of the only rank; use accum=4"
    if case.terms == "aux" and not (
        run.balance.uses_losses and run.moe.blocks(run.model.num_layers)
    ):
        return "terms=aux: the run has no auxiliary losses (all weights of balance are 0)"
    try:
        stage_of(case)
    except ConfigError as error:
        return str(error)

    # With terms=all: validation rejects a run without main losses, but such a case is meaningful.
    config = run_for_case(run, replace(case, terms="all"), world_size, pairs)
    return "; ".join(problems(config, world_size))


def run_problems(run: RunConfig, world_size: int, pairs: int) -> list[str]:
    """Errors of the run configuration that make every case unsupported."""
    default = Case(precision=run.precision.compute)
    divisible = max(pairs - pairs % world_size, world_size)
    messages = problems(run_for_case(run, default, world_size, divisible), world_size)
    return messages + vocabulary_problems(run)


def missing_rows(case: Case, world_size: int, pairs: int) -> tuple[int, ...]:
    """Rows of the global batch that are missing in this case, ascending.

    `pairs`: every fifth row from the second on, so that ranks have unequal numbers of pairs.
    `rank`: all rows of the last rank; with a single rank, those of its first micro-batch.
    """
    if case.missing == "none":
        return ()
    if case.missing == "pairs":
        return tuple(range(1, pairs, 5))

    micro_batch_size = pairs // (world_size * case.accumulation)
    if world_size == 1:
        return tuple(range(micro_batch_size))
    last = world_size - 1
    return tuple(row for row in range(pairs) if row // micro_batch_size % world_size == last)
