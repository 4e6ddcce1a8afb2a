"""Small runs with many kinds of routing, and jobs of `pretrain.parity` on them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common.config import dump_yaml
from pretrain.config.experts import BalanceConfig, MoEConfig, PerModality
from pretrain.config.schema import BatchConfig, LossConfig, ModelConfig, OptimConfig, RunConfig
from pretrain.parity.cases import Case
from pretrain.parity.job import Job, Result
from pretrain.parity.launch import WORKER, launch_local_ranks
from tests.support.launch import ROOT

PAIRS = 8
"""Minimum global batch size; `run_cases` increases it so that no micro-batch is empty."""

BOTH_MODALITIES = PerModality(image=0.05, text=0.1)
RUN_SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    # Balance weights as in the presets, small compared with the other losses.
    "usual": ({}, {"balance_weight": 1e-3, "router_z_weight": 1e-3}),
    # All auxiliary losses, routing noise and random capacity priority.
    "noisy": (
        {
            "backend": "loop",
            "routing": "noisy_top_k",
            "noise_std": 2.0,
            "capacity_factor": 0.9,
            "capacity_priority": "random",
            "capacity_group_size": 2,
        },
        {
            "importance_weight": 0.1,
            "load_weight": 0.1,
            "local_entropy_weight": BOTH_MODALITIES,
            "global_entropy_weight": BOTH_MODALITIES,
            "global_entropy_experts": PerModality(image=4.0, text=4.0),
            "expert_l1_weight": 1e-3,
            "router_l1_weight": 1e-2,
        },
    ),
    "sampled": (
        {
            "routing": "sampled",
            "score_func": "sigmoid",
            "capacity_factor": 1.0,
            "capacity_priority": "batch",
            "capacity_group_size": 2,
            "router_input": "caption",
        },
        {
            "bias": "zscore",
            "bias_rate": 0.02,
            "bias_per_modality": True,
            "importance_weight": 0.1,
            "expert_l1_weight": 1e-3,
        },
    ),
    "experts": (
        {"routing": "expert_choice", "router_input": "caption"},
        {"router_l1_weight": 1e-2},
    ),
    "pools": (
        {
            "backend": "loop",
            "pools": "modality",
            "top_k": 1,
            "capacity_factor": 0.8,
            "capacity_group_size": 1,
        },
        {"bias": "sign", "bias_rate": 0.05, "global_entropy_weight": BOTH_MODALITIES},
    ),
}
"""Settings of `moe` and of `balance`, by the name of the run."""


def run_config(name: str) -> RunConfig:
    """A small run with one of `RUN_SETTINGS`.

    The balance weights are large, so that a wrong scale of the auxiliary losses is detected, and
    the clipping norm is small, so that gradients are clipped.
    """
    moe, balance = RUN_SETTINGS[name]
    return RunConfig(
        name=name,
        model=ModelConfig(
            width=32,
            num_layers=3,
            num_heads=2,
            ffn_width=48,
            fusion_layer=2,
            image_size=16,
            patch_size=8,
            stem="conv",
            vocab_size=50,
            context_length=12,
            embed_dim=16,
            pool_heads=2,
        ),
        moe=MoEConfig(**({"num_experts": 4, "top_k": 2, "expert_width": 16} | moe)),
        balance=BalanceConfig(**({"balance_weight": 0.1, "router_z_weight": 0.1} | balance)),
        # Not 1, so that a weight that is omitted or applied twice is detected.
        loss=LossConfig(contrastive_weight=0.7, caption_weight=1.3),
        batch=BatchConfig(global_batch_size=PAIRS, micro_batch_size=PAIRS),
        optim=OptimConfig(clip_norm=0.5, lr=1e-2),
    )


def run_cases(
    cases: Sequence[Case],
    world_size: int,
    folder: Path,
    *,
    worker: Sequence[str] = WORKER,
    variables: Mapping[str, str] | None = None,
    seconds: float = 120.0,
) -> list[Result]:
    """Check cases of the runs on `world_size` ranks; results in the order of `cases`."""
    runs, pairs = {}, max(PAIRS, world_size * max(case.accumulation for case in cases))
    for name in {case.run for case in cases}:
        path = folder / f"{name}.yaml"
        path.write_text(dump_yaml(run_config(name)), encoding="utf-8")
        runs[name] = str(path)
    job = Job(
        runs=runs,
        cases=tuple(cases),
        pairs=pairs,
        folder=str(folder),
        seconds=seconds,
        float64=False,
    )
    messages: list[dict[str, Any]] = []
    launch_local_ranks(
        job,
        world_size,
        messages.append,
        worker=worker,
        variables={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | dict(variables or {}),
    )
    indices = [message.get("case") for message in messages]
    assert indices == list(range(len(cases))), json.dumps(messages)[-3000:]
    return [Result.from_json(message["result"]) for message in messages]


def describe(result: Result) -> str:
    """A result as one line, for assertion messages."""
    return json.dumps(dataclasses.asdict(result))
