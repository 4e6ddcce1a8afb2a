"""Parameters, FLOPs, batch sizes and layout of a run, computed from its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.common.config import to_mapping
from pretrain.config.batch import plan_batch
from pretrain.config.schema import RunConfig
from pretrain.model.count import count_flops, count_parameters
from pretrain.parallel.deepspeed_config import profile_path, resolve_for_run


def make_plan(run: RunConfig, path: Path, *, world_size: int, text_tokens: float) -> dict[str, Any]:
    """What `vlmoe plan` shows of a run, as JSON values. A pair is an image with its caption.

    Args:
        run: A valid run.
        path: The run file.
        world_size: Number of ranks.
        text_tokens: Average tokens per caption.

    Raises:
        ConfigError: The DeepSpeed profile is missing or contradicts the run.
    """
    batch = plan_batch(run.batch.global_batch_size, run.batch.micro_batch_size, world_size)
    parameters = count_parameters(run.model, run.moe)
    flops = count_flops(run.model, run.moe, text_tokens=text_tokens)
    uses_deepspeed = run.parallel.engine == "deepspeed"
    moe_blocks = list(run.moe.blocks(run.model.num_layers))
    total_pairs = run.schedule.total_steps * batch.global_batch_size

    return {
        "run": str(path),
        "name": run.name,
        "params": {
            "total": parameters.total,
            "active": parameters.active,
            "trunk_total": parameters.trunk_total,
            "trunk_active": parameters.trunk_active,
            "embeddings": parameters.embeddings,
            "heads": parameters.heads,
        },
        "flops_per_pair": {
            "forward": round(flops.forward),
            "training": round(flops.training),
            "patches": run.model.num_patches,
            "text_tokens": text_tokens,
        },
        "batch": batch._asdict(),
        "schedule": {
            "total_steps": run.schedule.total_steps,
            "total_pairs": total_pairs,
            "total_flops": round(
                flops.training * run.schedule.total_steps * batch.global_batch_size
            ),
        },
        "layout": {
            "world_size": world_size,
            "expert_parallel_size": run.parallel.expert_parallel_size,
            "expert_copies": world_size // run.parallel.expert_parallel_size,
            "experts_per_rank": run.moe.num_experts // run.parallel.expert_parallel_size,
            "moe_blocks": moe_blocks,
        },
        "routing": to_mapping(run.moe) if moe_blocks else None,
        "balance": to_mapping(run.balance) if moe_blocks else None,
        "deepspeed_profile": str(profile_path(run.parallel.deepspeed)) if uses_deepspeed else None,
        "deepspeed": resolve_for_run(run, path, batch) if uses_deepspeed else None,
    }
