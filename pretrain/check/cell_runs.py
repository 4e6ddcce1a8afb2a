"""The run configuration of a cell, its missing rows, and the reasons why a cell is unsupported."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from data_pipeline.common.errors import ConfigError
from pretrain.check.cells import Cell, stage_of
from pretrain.config.schema import BatchConfig, PrecisionConfig, RunConfig
from pretrain.config.validate import problems


def min_global_batch_size(cells: Iterable[Cell], run: RunConfig, world_size: int) -> int:
    """Pairs of the smallest global batch that all these cells can split.

    Each micro-batch of each rank gets one capacity group, or two pairs without expert capacity.
    """
    counts = [cell.accumulation for cell in cells]
    unit = run.moe.capacity_group_size if run.moe.capacity_factor else 2
    return world_size * unit * math.lcm(1, *counts)


def run_for_cell(run: RunConfig, cell: Cell, world_size: int, pairs: int) -> RunConfig:
    """The run with the cell's settings; `pairs` must be a multiple of world size x accumulation."""
    loss = run.loss
    if cell.terms == "aux":
        loss = replace(loss, contrastive_weight=0.0, caption_weight=0.0)
    micro_batch_size = pairs // (world_size * cell.accumulation)

    return replace(
        run,
        loss=loss,
        model=replace(run.model, activation_checkpointing=cell.recompute),
        batch=BatchConfig(global_batch_size=pairs, micro_batch_size=micro_batch_size),
        precision=PrecisionConfig(compute=cell.precision),
        parallel=replace(
            run.parallel,
            engine="deepspeed",
            expert_parallel_size=cell.expert_parallel_size,
            deepspeed=cell.profile,
        ),
    )


def unsupported_reason(run: RunConfig, cell: Cell, world_size: int, pairs: int) -> str:
    """Why a cell cannot run; empty if it can."""
    unit = world_size * cell.accumulation
    if pairs % unit:
        return (
            f"{pairs} pairs do not split into {world_size} ranks x {cell.accumulation} "
            f"micro-batches; use a multiple of {unit} pairs"
        )
    if cell.missing == "rank" and world_size == 1 and cell.accumulation == 1:
        return "missing=rank would remove every pair of the only rank; use accum=4"
    try:
        stage_of(cell)
    except ConfigError as error:
        return str(error)

    # With terms=all: validation rejects a run without main losses, but such a cell is meaningful.
    config = run_for_cell(run, replace(cell, terms="all"), world_size, pairs)
    return "; ".join(problems(config, world_size))


def run_problems(run: RunConfig, world_size: int, pairs: int) -> list[str]:
    """Errors of the run configuration that make every cell unsupported."""
    default = Cell(precision=run.precision.compute)
    divisible = max(pairs - pairs % world_size, world_size)
    return problems(run_for_cell(run, default, world_size, divisible), world_size)


def missing_rows(cell: Cell, world_size: int, pairs: int) -> tuple[int, ...]:
    """Rows of the global batch that are missing in this cell, ascending.

    `pairs`: every fifth row from the second on, so that ranks have unequal numbers of pairs.
    `rank`: all rows of the last rank; with a single rank, those of its first micro-batch.
    """
    if cell.missing == "none":
        return ()
    if cell.missing == "pairs":
        return tuple(range(1, pairs, 5))

    micro_batch_size = pairs // (world_size * cell.accumulation)
    if world_size == 1:
        return tuple(range(micro_batch_size))
    last = world_size - 1
    return tuple(row for row in range(pairs) if row // micro_batch_size % world_size == last)
