"""Runs in every rank: trains on DeepSpeed's own MoE layer and, in plain torch, on ours, and tells
how they differ.

`python -m tests.support.native_layer_worker CELLS`; rank 0 prints one JSON line for each cell.
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
from pretrain.config.experts import BalanceConfig, ByModality, MoEConfig
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

PAIRS, STEPS, COLUMNS, EXPERTS = 8, 3, 12, 4


def run_config(cell: dict[str, Any]) -> RunConfig:
    """A small model; large balance weights, so that a wrong share would show, and a clip that
    acts."""
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
            context_length=COLUMNS,
            embed_dim=16,
            pool_heads=2,
            recompute=cell["recompute"],
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
            local_entropy_weight=ByModality(image=0.05, text=0.1),
        ),
        batch=BatchConfig(global_batch_size=PAIRS, micro_batch_size=cell["per_forward"]),
        optim=OptimConfig(clip_norm=0.5, lr=1e-2),
        precision=PrecisionConfig(compute=cell["precision"]),
        parallel=ParallelConfig(expert_parallel_size=cell["ep"], deepspeed=f"zero{cell['stage']}"),
    )


def pairs(step: int, rows: range, missing: list[int]) -> Batch:
    """Some pairs of the global batch of a step, without those that are missing."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (PAIRS, 3, 16, 16), generator=generator, dtype=torch.uint8)
    lengths = torch.randint(3, COLUMNS, (PAIRS,), generator=generator)
    ids = torch.randint(4, 50, (PAIRS, COLUMNS), generator=generator) * (
        torch.arange(COLUMNS) < lengths.unsqueeze(1)
    )
    kept = torch.tensor([row for row in rows if row not in missing], dtype=torch.int64)
    positions = valid_positions(lengths[kept], COLUMNS)
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
    """All steps, and the gradients of the first."""
    gradients: dict[str, torch.Tensor] = {}
    take_step = engine.step

    def keep_and_step(rate: float) -> float:
        gradients.update({} if gradients else engine.gradients())
        return take_step(rate)

    engine.step = keep_and_step  # type: ignore[method-assign]
    each = run.batch.micro_batch_size
    results = []
    for step in range(STEPS):
        starts = range(engine.rank * each, PAIRS, engine.world_size * each)
        batches = [pairs(step, range(start, start + each), missing) for start in starts]
        results.append(train_step(engine, batches, run, step=step, learning_rate=1e-2 / (step + 2)))
    return results, gradients


def differences(cell: dict[str, Any]) -> dict[str, Any]:
    """Largest relative differences of losses, gradient norm and gradients; and of choices."""
    run, environment = run_config(cell), rank_environment()
    engine = build_engine(
        run, environment, plan_batch(PAIRS, cell["per_forward"], environment.world_size)
    )
    results, gradients = train(engine, run, cell["missing"])
    whole = replace(run, batch=BatchConfig(global_batch_size=PAIRS, micro_batch_size=PAIRS))
    layout = Layout(
        world_size=1,
        expert_parallel_size=1,
        zero_stage=-1,
        precision=cell["precision"],
        num_experts=EXPERTS,
    )
    plain = PlainEngine(build_model(whole), run.optim, layout, torch.device("cpu"))
    true_results, true = train(plain, whole, cell["missing"])
    compared = list(zip(results, true_results, strict=True))[
        : 1 if cell["precision"] == "bf16" else STEPS
    ]
    losses = [
        abs(r.losses[k] - t.losses[k]) / max(abs(t.losses[k]), 1e-2)
        for r, t in compared
        for k in t.losses
    ]
    norms = [abs(r.grad_norm - t.grad_norm) / t.grad_norm for r, t in compared]
    worst, seen = 0.0, set()
    for name, gradient in gradients.items():
        base, _, span = name.partition("@")
        first, _, last = span.partition(":")
        expected = true[f"{base}@0:{EXPERTS}"][int(first) : int(last)] if span else true[name]
        worst = max(worst, float((gradient - expected).norm() / expected.norm().clamp(min=1e-12)))
        seen.add(base)
    worst_everywhere = torch.tensor([worst])
    dist.all_reduce(worst_everywhere, op=dist.ReduceOp.MAX)
    return cell | {
        "loss": max(losses),
        "norm": max(norms),
        "gradient": float(worst_everywhere),
        "choices": max(float((r.choices_LME - t.choices_LME).abs().max()) for r, t in compared),
        "unseen": sorted({name.partition("@")[0] for name in true} - seen),
        "native": sum("deepspeed_experts" in name for name, _ in engine.model.named_parameters()),
    }


def main(cells: str) -> None:
    """Every cell, in one process group."""
    torch.set_num_threads(1)
    environment = rank_environment()
    start_process_group(environment, 120)
    for cell in json.loads(cells):
        found = differences(cell)
        if environment.rank == 0:
            print("CELL " + json.dumps(found), flush=True)
    dist.barrier()
    stop_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
