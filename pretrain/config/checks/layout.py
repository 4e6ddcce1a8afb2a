"""Checks of batch sizes, parallelism and precision against the number of ranks and the model."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.tables import counted
from pretrain.config.batch import plan_batch
from pretrain.config.schema import RunConfig


def batch_problems(run: RunConfig, world_size: int) -> Iterator[str]:
    """Batch sizes that cannot be split over the ranks."""
    try:
        plan_batch(run.batch.global_batch_size, run.batch.micro_batch_size, world_size)
    except ConfigError as error:
        yield str(error)


def negatives_problems(run: RunConfig) -> Iterator[str]:
    """A batch that is too small for the objective."""
    if run.batch.global_batch_size == 1 and run.loss.contrastive_weight > 0:
        yield (
            "batch.global_batch_size is 1, but the contrastive loss needs other pairs as "
            "negatives; increase it, or set loss.contrastive_weight=0"
        )


def parallel_problems(run: RunConfig, world_size: int) -> Iterator[str]:
    """Expert parallelism and engine settings that do not fit the ranks."""
    yield from _expert_parallel_problems(run, world_size)
    if run.parallel.engine == "plain" and world_size != 1:
        yield (
            f"parallel.engine is plain, which runs in one process, but there are {world_size} "
            f"ranks; start one process, or set parallel.engine=deepspeed"
        )


def _expert_parallel_problems(run: RunConfig, world_size: int) -> Iterator[str]:
    size, num_experts = run.parallel.expert_parallel_size, run.moe.num_experts
    setting = f"parallel.expert_parallel_size is {size}"
    if size > num_experts:
        yield (
            f"{setting}: more ranks than the {counted(num_experts, 'expert')} (moe.num_experts); "
            f"use at most {_max_divisor(num_experts, world_size)} with "
            f"{counted(world_size, 'rank')}"
        )
    else:
        if num_experts % size:
            yield (
                f"{setting}, which does not divide moe.num_experts ({num_experts}); possible: "
                f"{divisors(num_experts)}"
            )
        if world_size % size:
            yield (
                f"{setting}, which does not divide the number of ranks ({world_size}); start a "
                f"multiple of {size} ranks, or use {_max_divisor(num_experts, world_size)}"
            )
    if size > 1 and not run.moe.blocks(run.model.num_layers):
        yield (
            f"{setting}, but no block has experts (moe.start {run.moe.start}, moe.stop "
            f"{run.moe.stop}, model.num_layers {run.model.num_layers}); set it to 1"
        )


def precision_problems(run: RunConfig) -> Iterator[str]:
    """Widths that the grouped matrix product does not support."""
    # `auto` uses the grouped product on GPU, and where the run will train is not known here.
    if run.moe.backend == "loop":
        return
    # torch's grouped matrix product needs rows that are aligned to 16 bytes.
    multiple = {"bf16": 8, "fp32": 4}[run.precision.compute]
    widths = {"model.width": run.model.width, "moe.expert_width": run.moe.expert_width}
    for name, width in widths.items():
        if width % multiple:
            yield (
                f"{name} is {width}, but with precision.compute={run.precision.compute} it must be "
                f"a multiple of {multiple}, or set moe.backend=loop"
            )


def divisors(number: int) -> str:
    """The divisors of a positive number as text: `1, 2, 4`."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _max_divisor(num_experts: int, world_size: int) -> int:
    """Largest valid `parallel.expert_parallel_size` for this number of ranks."""
    candidates = range(1, min(num_experts, world_size) + 1)
    return max(n for n in candidates if num_experts % n == 0 and world_size % n == 0)
