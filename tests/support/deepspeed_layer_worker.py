"""A rank that trains with DeepSpeed's MoE layer and compares with the builtin layer in one process.

`python -m tests.support.deepspeed_layer_worker CASES`; `CASES` is a JSON list of settings, and rank
0 prints one line with a JSON object for each case.
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


def run_config(case: dict[str, Any]) -> RunConfig:
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
            activation_checkpointing=case["recompute"],
        ),
        moe=MoEConfig(
            num_experts=EXPERTS,
            top_k=case["top_k"],
            expert_width=16,
            shared_experts=case["shared_experts"],
            backend="deepspeed",
        ),
        balance=BalanceConfig(
            balance_weight=0.1,
            router_z_weight=0.1,
            importance_weight=0.1,
            local_entropy_weight=PerModality(image=0.05, text=0.1),
        ),
        batch=BatchConfig(
            global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=case["micro_batch_size"]
        ),
        optim=OptimConfig(clip_norm=0.5, lr=1e-2),
        precision=PrecisionConfig(compute=case["precision"]),
        parallel=ParallelConfig(
            expert_parallel_size=case["expert_parallel_size"], deepspeed=f"zero{case['zero_stage']}"
        ),
    )


def make_batch(step: int, rows: range, missing_rows: list[int]) -> Batch:
    """The rows of a step's global batch that are in `rows` and not in `missing_rows`."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(
        0, 256, (GLOBAL_BATCH_SIZE, 3, 16, 16), generator=generator, dtype=torch.uint8
    )
    lengths = torch.randint(3, CONTEXT_LENGTH, (GLOBAL_BATCH_SIZE,), generator=generator)
    ids = torch.randint(4, 50, (GLOBAL_BATCH_SIZE, CONTEXT_LENGTH), generator=generator) * (
        torch.arange(CONTEXT_LENGTH) < lengths.unsqueeze(1)
    )
    kept = torch.tensor([row for row in rows if row not in missing_rows], dtype=torch.int64)
    return Batch(
        images=images[kept],
        text_ids=ids[kept],
        text_lengths=lengths[kept],
        text_positions=valid_positions(lengths[kept], CONTEXT_LENGTH),
        caption_hashes=kept,
        keys=(),
        captions=(),
        problems=(),
        seconds=0.0,
        ids=kept,
        slots=kept - rows.start,
    )


def train(
    engine: TrainEngine, run: RunConfig, missing_rows: list[int]
) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
    """Results of all steps, and the gradients of the first step."""
    gradients: dict[str, torch.Tensor] = {}
    original_step = engine.step

    def record_gradients_and_step(learning_rate: float) -> float:
        if not gradients:
            gradients.update(engine.gradients())
        return original_step(learning_rate)

    engine.step = record_gradients_and_step  # type: ignore[method-assign]
    size = run.batch.micro_batch_size
    results = []
    for step in range(STEPS):
        starts = range(engine.rank * size, GLOBAL_BATCH_SIZE, engine.world_size * size)
        batches = [make_batch(step, range(start, start + size), missing_rows) for start in starts]
        results.append(train_step(engine, batches, run, step=step, learning_rate=1e-2 / (step + 2)))
    return results, gradients


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """Train with DeepSpeed's layer on all ranks, and with the builtin layer in this process.

    Returns:
        The settings of the case, the maximum relative differences of losses, gradient norm and
        gradients, the maximum difference of assignment counts, the names of gradients that
        DeepSpeed's run lacks, and its number of expert parameters.
    """
    run, environment = run_config(case), rank_environment()
    batch_plan = plan_batch(GLOBAL_BATCH_SIZE, case["micro_batch_size"], environment.world_size)
    engine = build_engine(run, environment, batch_plan)
    results, gradients = train(engine, run, case["missing_rows"])
    expected_results, expected_gradients = train_reference(run, case)

    # In bf16 only the first step: later ones start from weights that were rounded differently.
    num_compared = 1 if case["precision"] == "bf16" else STEPS
    pairs = list(zip(results, expected_results, strict=True))[:num_compared]
    compared_names = {name.partition("@")[0] for name in gradients}
    expected_names = {name.partition("@")[0] for name in expected_gradients}
    return case | {
        "loss": max(loss_difference(actual, expected) for actual, expected in pairs),
        "norm": max(
            abs(actual.grad_norm - expected.grad_norm) / expected.grad_norm
            for actual, expected in pairs
        ),
        "gradient": gradient_difference(gradients, expected_gradients),
        "assignments": max(
            float((actual.assignments_LME - expected.assignments_LME).abs().max())
            for actual, expected in pairs
        ),
        "missing_gradients": sorted(expected_names - compared_names),
        "num_expert_parameters": sum(
            "deepspeed_experts" in name for name, _ in engine.model.named_parameters()
        ),
    }


def train_reference(
    run: RunConfig, case: dict[str, Any]
) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
    """Train with the builtin layer in this process, with the global batch as one micro-batch."""
    batch = BatchConfig(global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=GLOBAL_BATCH_SIZE)
    reference_run = replace(run, batch=batch)
    layout = Layout(
        world_size=1,
        expert_parallel_size=1,
        zero_stage=-1,
        precision=case["precision"],
        num_experts=EXPERTS,
    )
    engine = PlainEngine(build_model(reference_run), run.optim, layout, torch.device("cpu"))
    return train(engine, reference_run, case["missing_rows"])


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
        base, _, expert_range = name.partition("@")
        if expert_range:
            first, _, last = expert_range.partition(":")
            expected = expected_gradients[f"{base}@0:{EXPERTS}"][int(first) : int(last)]
        else:
            expected = expected_gradients[name]
        difference = (gradient - expected).norm() / expected.norm().clamp(min=1e-12)
        max_difference = max(max_difference, float(difference))

    max_over_ranks = torch.tensor([max_difference])
    dist.all_reduce(max_over_ranks, op=dist.ReduceOp.MAX)
    return float(max_over_ranks)


def main(cases: str) -> None:
    """Run all cases in one process group."""
    torch.set_num_threads(1)
    environment = rank_environment()
    start_process_group(environment, 120)
    for case in json.loads(cases):
        result = compare(case)
        if environment.rank == 0:
            print("RESULT " + json.dumps(result), flush=True)
    dist.barrier()
    stop_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
