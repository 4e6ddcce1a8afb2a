"""Checks of the sparse layers and of load balancing."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.common.tables import counted
from pretrain.config.checks.layout import divisors
from pretrain.config.schema import RunConfig


def expert_problems(run: RunConfig) -> Iterator[str]:
    """Settings of the sparse layers that contradict the model or the batch."""
    moe, model = run.moe, run.model
    micro_batch_size = run.batch.micro_batch_size
    if moe.uses_capacity and micro_batch_size % moe.capacity_group_size:
        yield (
            f"moe.capacity_group_size is {moe.capacity_group_size}, which does not divide "
            f"batch.micro_batch_size ({micro_batch_size}); possible: "
            f"{divisors(micro_batch_size)}"
        )

    has_fused_moe_block = any(b >= model.fusion_layer for b in moe.blocks(model.num_layers))
    if moe.router_input == "caption" and not has_fused_moe_block:
        yield (
            f"moe.router_input is caption, but no block from model.fusion_layer "
            f"({model.fusion_layer}) on has experts (moe.start {moe.start}, moe.every {moe.every}, "
            f"moe.stop {moe.stop}); set moe.router_input=token"
        )


def balance_problems(run: RunConfig) -> Iterator[str]:
    """Settings of load balancing that contradict the routing."""
    targets = vars(run.balance.global_entropy_experts)
    for index, (modality, target) in enumerate(targets.items()):
        pool = run.moe.pool(index)
        pool_size = pool.stop - pool.start
        if target > pool_size:
            yield (
                f"balance.global_entropy_experts.{modality} is {target:g}, more than the "
                f"{counted(pool_size, 'expert')} for this modality"
            )
    if run.balance.load_weight and not run.moe.uses_noise:
        yield (
            f"balance.load_weight is {run.balance.load_weight}, but the load loss needs noise on "
            f"the logits; set moe.routing=noisy_top_k, or balance.load_weight=0"
        )
