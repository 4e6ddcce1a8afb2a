"""A rank that trains with DeepSpeed's MoE layer and compares with the builtin layer in one process.

`python -m tests.support.native_layer_worker CELLS`; `CELLS` is a JSON list, and rank 0 prints one
JSON line for each cell.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.samples import Batch
from pretrain.config.batch import plan_batch
from pretrain.config.experts import BalanceConfig, MoEConfig, PerModality
from pretrain.config.schema import (
    BatchConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
)
from pretrain.model import build_model
from pretrain.model.vision_language import valid_positions
from pretrain.parallel.engine import TrainEngine
from pretrain.parallel.environment import rank_environment, start_process_group, stop_process_group
from pretrain.parallel.layout import Layout
from pretrain.parallel.plain_engine import PlainEngine
from pretrain.train.build import build_engine
from pretrain.train.step import StepResult, train_step

GLOBAL_BATCH_SIZE, STEPS, CONTEXT_LENGTH, EXPERTS = 8, 3, 12, 4


def run_config(cell: dict[str, Any]) -> RunConfig:
    """A small run; balance weights are large, so that a wrong scale is detected, and gradients are
    clipped."""
    return RunConfig(
        model=ModelConfig(
            width=32,
            num_layers=3,
            num_heads=2,
            ffn_width=48,
            fusion_layer=2,
            image_size=16,
            patch_size=8,
            vocab_size=50,
            context_length=CONTEXT_LENGTH,
            embed_dim=16,
            pool_heads=2,
            activation_checkpointing=cell["recompute"],
        ),
        moe=MoEConfig(
            num_experts=EXPERTS,
            top_k=cell["k"],
            expert_width=16,
            shared_experts=cell["shared"],
            backend="deepspeed",
        ),
        balance=BalanceConfig(
            balance_weight=0.1,
            router_z_weight=0.1,
            importance_weight=0.1,
            local_entropy_weight=PerModality(image=0.05, text=0.1),
        ),
        batch=BatchConfig(
            global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=cell["micro_batch_size"]
        ),
        optim=OptimConfig(clip_norm=0.5, lr=1e-2),
        precision=PrecisionConfig(compute=cell["precision"]),
        parallel=ParallelConfig(expert_parallel_size=cell["ep"], deepspeed=f"zero{cell['stage']}"),
    )


def make_batch(step: int, rows: range, missing: list[int]) -> Batch:
    """The rows of a step's global batch that are in `rows` and not in `missing`."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(
        0, 256, (GLOBAL_BATCH_SIZE, 3, 16, 16), generator=generator, dtype=torch.uint8
    )
    lengths = torch.randint(3, CONTEXT_LENGTH, (GLOBAL_BATCH_SIZE,), generator=generator)
    ids = torch.randint(4, 50, (GLOBAL_BATCH_SIZE, CONTEXT_LENGTH), generator=generator) * (
        torch.arange(CONTEXT_LENGTH) < lengths.unsqueeze(1)
    )
    kept = torch.tensor([row for row in rows if row not in missing], dtype=torch.int64)
    positions = valid_positions(lengths[kept], CONTEXT_LENGTH)
    return Batch(
        images[kept],
        ids[kept],
        lengths[kept],
        positions,
        kept,
        (),
        (),
        (),
        0.0,
        kept,
        kept - rows.start,
    )


def train(
    engine: TrainEngine, run: RunConfig, missing: list[int]
) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
    """Results of all steps, and the gradients of the first step."""
    gradients: dict[str, torch.Tensor] = {}
    original = engine.step

    def record_gradients_and_step(rate: float) -> float:
        gradients.update({} if gradients else engine.gradients())
        return original(rate)

    engine.step = record_gradients_and_step  # type: ignore[method-assign]
    size = run.batch.micro_batch_size
    results = []
    for step in range(STEPS):
        starts = range(engine.rank * size, GLOBAL_BATCH_SIZE, engine.world_size * size)
        batches = [make_batch(step, range(start, start + size), missing) for start in starts]
        results.append(train_step(engine, batches, run, step=step, learning_rate=1e-2 / (step + 2)))
    return results, gradients


def differences(cell: dict[str, Any]) -> dict[str, Any]:
    """Maximum relative differences of losses, gradient norm and gradients, and maximum difference
    of assignment counts."""
    run, environment = run_config(cell), rank_environment()
    engine = build_engine(
        run,
        environment,
        plan_batch(GLOBAL_BATCH_SIZE, cell["micro_batch_size"], environment.world_size),
    )
    results, gradients = train(engine, run, cell["missing"])
    single_batch = BatchConfig(
        global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=GLOBAL_BATCH_SIZE
    )
    reference_run = replace(run, batch=single_batch)
    layout = Layout(
        world_size=1,
        expert_parallel_size=1,
        zero_stage=-1,
        precision=cell["precision"],
        num_experts=EXPERTS,
    )
    plain = PlainEngine(build_model(reference_run), run.optim, layout, torch.device("cpu"))
    expected_results, expected_gradients = train(plain, reference_run, cell["missing"])

    num_compared = 1 if cell["precision"] == "bf16" else STEPS
    compared = list(zip(results, expected_results, strict=True))[:num_compared]
    native_names = [name for name, _ in engine.model.named_parameters()]
    compared_names = {name.partition("@")[0] for name in gradients}
    return cell | {
        "loss": max(loss_difference(actual, expected) for actual, expected in compared),
        "norm": max(abs(a.grad_norm - e.grad_norm) / e.grad_norm for a, e in compared),
        "gradient": gradient_difference(gradients, expected_gradients),
        "assignments": max(
            float((a.assignments_LME - e.assignments_LME).abs().max()) for a, e in compared
        ),
        "unseen": sorted({name.partition("@")[0] for name in expected_gradients} - compared_names),
        "native": sum("deepspeed_experts" in name for name in native_names),
    }


def loss_difference(actual: StepResult, expected: StepResult) -> float:
    """Maximum relative difference of the losses of a step."""
    return max(
        abs(actual.losses[name] - value) / max(abs(value), 1e-2)
        for name, value in expected.losses.items()
    )


def gradient_difference(
    gradients: dict[str, torch.Tensor], expected_gradients: dict[str, torch.Tensor]
) -> float:
    """Maximum relative difference over all gradients of all ranks.

    Gradients of experts are named `NAME@FIRST:LAST` by the range of experts that they belong to.
    """
    max_difference = 0.0
    for name, gradient in gradients.items():
        base, _, span = name.partition("@")
        if span:
            first, _, last = span.partition(":")
            expected = expected_gradients[f"{base}@0:{EXPERTS}"][int(first) : int(last)]
        else:
            expected = expected_gradients[name]
        difference = (gradient - expected).norm() / expected.norm().clamp(min=1e-12)
        max_difference = max(max_difference, float(difference))
    over_ranks = torch.tensor([max_difference])
    dist.all_reduce(over_ranks, op=dist.ReduceOp.MAX)
    return float(over_ranks)


def main(cells: str) -> None:
    """Run all cells in one process group."""
    torch.set_num_threads(1)
    environment = rank_environment()
    start_process_group(environment, 120)
    for cell in json.loads(cells):
        result = differences(cell)
        if environment.rank == 0:
            print("CELL " + json.dumps(result), flush=True)
    dist.barrier()
    stop_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
