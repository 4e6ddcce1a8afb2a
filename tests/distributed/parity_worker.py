"""Runs in every rank: trains the same global batches in every cell and in the one-process reference.

Prints one JSON line per cell from rank 0: the largest relative differences of losses, gradient norm and
gradients. Called by test_parallel_equals_serial.py through torchrun.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.samples import Batch
from pretrain.config.batch import plan_batch
from pretrain.config.schema import (
    BalanceConfig,
    BatchConfig,
    ByModality,
    ModelConfig,
    MoEConfig,
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

PAIRS, STEPS, NUM_EXPERTS = 8, 3, 4


BOTH = ByModality(image=0.05, text=0.1)
ROUTING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "": ({}, {}),
    # Every auxiliary term, with noise, places given out by chance and biases that move fast.
    "noisy": (
        {"backend": "loop", "choice": "noisy", "noise": 2.0, "capacity_factor": 0.9, "capacity_priority": "random",
         "capacity_group": 2},
        {"importance_weight": 0.1, "load_weight": 0.1, "local_entropy_weight": BOTH, "global_entropy_weight": BOTH,
         "global_entropy_experts": ByModality(image=4.0, text=4.0), "expert_l1_weight": 1e-3,
         "router_l1_weight": 1e-2, "bias": "zscore", "bias_rate": 0.02, "bias_per_modality": True},
    ),
    "sampled": (
        {"choice": "sampled", "score": "sigmoid", "capacity_factor": 1.0, "capacity_priority": "batch",
         "capacity_group": 2, "gate": "caption"},
        {"bias": "sign", "bias_rate": 0.02, "importance_weight": 0.1, "expert_l1_weight": 1e-3},
    ),
    "experts": ({"choice": "expert", "gate": "caption"}, {"router_l1_weight": 1e-2}),
    "pools": (
        {"backend": "loop", "pools": "modality", "experts_per_token": 1, "capacity_factor": 0.8, "capacity_group": 1},
        {"bias": "sign", "bias_rate": 0.05, "global_entropy_weight": BOTH},
    ),
}
"""Settings of moe and balance by name."""


def run_config(
    stage: int | str, expert_parallel: int, precision: str, pairs_per_forward: int, recompute: bool, routing: str
) -> RunConfig:
    moe, balance = ROUTING[routing]
    # Large balance weights, so that a wrong share would show; a norm far above the clip, so that clipping acts.
    return RunConfig(
        model=ModelConfig(width=32, num_blocks=3, num_heads=2, ffn_width=48, fusion_start=2, image_size=16,
                          patch_size=8, stem="conv", vocab_size=50, text_length=12, embed_dim=16, pool_heads=2,
                          recompute=recompute),
        moe=MoEConfig(**({"num_experts": NUM_EXPERTS, "experts_per_token": 2, "expert_width": 16} | moe)),
        balance=BalanceConfig(balance_weight=0.1, router_z_weight=0.1, **balance),
        batch=BatchConfig(pairs_per_step=PAIRS, pairs_per_forward=pairs_per_forward),
        optim=OptimConfig(clip_norm=0.5, lr=1e-2),
        precision=PrecisionConfig(compute=precision),  # type: ignore[arg-type]
        parallel=ParallelConfig(expert_parallel=expert_parallel, deepspeed=f"zero{stage}"),
    )


def global_batch(step: int, *, bad: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Pairs of one step: uneven captions, one caption twice; `bad` ones are missing."""
    generator = torch.Generator().manual_seed(step)
    pairs = []
    for row in range(PAIRS):
        length = 3 + int(torch.randint(0, 8, (1,), generator=generator))
        pairs.append({
            "image": torch.randint(0, 256, (3, 16, 16), generator=generator, dtype=torch.uint8),
            "ids": torch.randint(4, 50, (length,), generator=generator),
            "hash": 7 if row in (1, 6) else 100 + row,
            "bad": row in bad,
            "id": 1000 * step + row,
        })
    return pairs


def collate(pairs: list[dict[str, Any]]) -> Batch:
    good = [pair for pair in pairs if not pair["bad"]]
    ids = torch.zeros(len(good), 12, dtype=torch.int64)
    for row, pair in enumerate(good):
        ids[row, : len(pair["ids"])] = pair["ids"]
    lengths = torch.tensor([len(pair["ids"]) for pair in good], dtype=torch.int64)
    images = torch.stack([p["image"] for p in good]) if good else torch.zeros(0, 3, 16, 16, dtype=torch.uint8)
    hashes = torch.tensor([pair["hash"] for pair in good], dtype=torch.int64)
    numbers = torch.tensor([pair["id"] for pair in good], dtype=torch.int64)
    slots = torch.tensor([slot for slot, pair in enumerate(pairs) if not pair["bad"]], dtype=torch.int64)
    return Batch(images, ids, lengths, valid_positions(lengths, 12), hashes, (), (), (), 0.0, numbers, slots)


Trained = tuple[list[StepResult], dict[str, torch.Tensor], dict[str, torch.Tensor]]


def train(engine: TrainEngine, run: RunConfig, bad: tuple[int, ...]) -> Trained:
    """Three steps; results of all, gradients of the first, biases after the last."""
    per_forward = run.batch.pairs_per_forward
    accumulation = PAIRS // (per_forward * engine.world)
    gradients: dict[str, torch.Tensor] = {}
    take_step = engine.step

    def step_and_keep(rate: float) -> float:
        gradients.update({} if gradients else engine.gradients())
        return take_step(rate)

    engine.step = step_and_keep  # type: ignore[method-assign]
    results = []
    for step in range(STEPS):
        pairs = global_batch(step, bad=bad)
        starts = [(micro * engine.world + engine.rank) * per_forward for micro in range(accumulation)]
        batches = [collate(pairs[start : start + per_forward]) for start in starts]
        # Another rate at each step, and none of them that of the configuration: it must reach the optimizer.
        rate = 1e-2 / (step + 2)
        results.append(train_step(engine, batches, run, step=step, learning_rate=rate))
    return results, gradients, {name: buffer.clone() for name, buffer in engine.model.named_buffers()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    scale = max(float(b.double().norm()), 1e-12)
    return float((a.double() - b.double()).norm()) / scale


def compare(
    mine: Trained, reference: Trained, world: int, precision: str
) -> dict[str, float]:
    (results, gradients, biases), (true_results, true_gradients, true_biases) = mine, reference
    # Bfloat16 parameters (DeepSpeed) and float32 ones rounded at use (the reference) part ways after the first
    # update: a rounded weight moves a token to another expert. So bfloat16 is judged on the first step.
    steps = 1 if precision == "bf16" else STEPS
    pairs = list(zip(results, true_results, strict=True))[:steps]
    # By step. A term that is nearly 0, such as a shortfall of entropy, is judged by the digits it was made of.
    losses = [max(abs(r.losses[k] - t.losses[k]) / max(abs(t.losses[k]), 1e-2) for k in t.losses) for r, t in pairs]
    norms = [abs(r.grad_norm - t.grad_norm) / max(t.grad_norm, 1e-6) for r, t in pairs]
    assert all(r.losses.keys() == t.losses.keys() for r, t in pairs)
    worst, where, seen = 0.0, "", set()
    for name, gradient in gradients.items():
        base, _, span = name.partition("@")
        if span:
            first, last = map(int, span.split(":"))
            true = true_gradients[f"{base}@0:{NUM_EXPERTS}"][first:last]
        else:
            true = true_gradients[name]
        seen.add(base)
        difference = relative(gradient, true)
        if difference > worst:
            worst, where = difference, name
    missing = {name.partition("@")[0] for name in true_gradients} - seen
    choices = max(float((r.choices_LME - t.choices_LME).abs().max()) for r, t in pairs)
    kept = max(float((r.router.kept_ME - t.router.kept_ME).abs().max()) for r, t in pairs)
    assert biases.keys() == true_biases.keys()
    bias = max((float((biases[name] - true).abs().max()) for name, true in true_biases.items()), default=0.0)
    moved = all(bool(true.any()) for true in true_biases.values())
    dropped = sum(float((t.router.choices_ME - t.router.kept_ME).sum()) for t in true_results)
    local = torch.tensor([worst, float(len(missing)), bias], dtype=torch.float64)
    if world > 1:
        dist.all_reduce(local, op=dist.ReduceOp.MAX)
    return {"loss": losses[0], "grad_norm": norms[0], "later": max(losses[1:] + norms[1:], default=0.0),
            "gradient": float(local[0]), "where": where,  # type: ignore[dict-item]
            "missing": float(local[1]), "choices": choices + kept, "bias": float(local[2]), "moved": moved,
            "dropped": dropped}


def reference(run: RunConfig, bad: tuple[int, ...]) -> Trained:
    """Plain torch, one process, the whole batch in one forward pass, nothing recomputed."""
    run = replace(run, batch=BatchConfig(pairs_per_step=PAIRS, pairs_per_forward=PAIRS),
                  model=replace(run.model, recompute=False))
    layout = Layout(world=1, expert_parallel=1, zero_stage=-1, precision=run.precision.compute, num_experts=NUM_EXPERTS)
    return train(PlainEngine(build_model(run), run.optim, layout, torch.device("cpu")), run, bad)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", required=True,
                        help="JSON rows [stage, ep, precision, per_forward, recompute, bad, routing]")
    cells = json.loads(parser.parse_args().cells)
    torch.set_num_threads(1)
    environment = rank_environment()
    start_process_group(environment, 120)
    for stage, ep, precision, per_forward, recompute, bad, routing in cells:
        run = run_config(stage, ep, precision, per_forward, recompute, routing)
        plan = plan_batch(PAIRS, per_forward, environment.world)
        engine = build_engine(run, environment, plan)
        found = compare(train(engine, run, tuple(bad)), reference(run, tuple(bad)), environment.world, precision)
        if environment.rank == 0:
            cell = {"stage": stage, "ep": ep, "precision": precision, "per_forward": per_forward,
                    "recompute": recompute, "bad": bad, "routing": routing, "world": environment.world}
            print("CELL " + json.dumps(cell | found), flush=True)
    dist.barrier()
    stop_process_group()  # or its threads may still run when the process ends, which C++ calls a crash


if __name__ == "__main__":
    main()
