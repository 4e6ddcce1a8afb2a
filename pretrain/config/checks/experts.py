"""Checks of the sparse layers and of load balancing."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.config.checks.layout import divisors
from pretrain.config.schema import RunConfig

_LOSS_WEIGHTS = (
    "balance_weight",
    "router_z_weight",
    "importance_weight",
    "load_weight",
    "expert_l1_weight",
    "router_l1_weight",
)
_PER_MODALITY = ("local_entropy_weight", "global_entropy_weight", "global_entropy_experts")


def expert_problems(run: RunConfig) -> Iterator[str]:
    """Settings of the sparse layers that contradict the model or the batch."""
    moe, model = run.moe, run.model
    if moe.start < 0:
        yield f"moe.start is {moe.start}, but must be at least 0"
    if moe.stop < -1:
        yield (
            f"moe.stop is {moe.stop}, but negative indices are not supported; give the index of "
            f"the block before which the MoE blocks end, or set moe.stop=-1 for no limit"
        )
    if moe.expert_width < 1:
        yield f"moe.expert_width is {moe.expert_width}, but must be at least 1"
    if model.ffn_width < 1:
        yield f"model.ffn_width is {model.ffn_width}, but must be at least 1"

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
    """Settings of load balancing that are out of range or contradict the routing."""
    balance = run.balance
    for name in _LOSS_WEIGHTS:
        value = getattr(balance, name)
        if value < 0:
            yield f"balance.{name} is {value}, but must be at least 0"
    for name in _PER_MODALITY:
        for modality in ("image", "text"):
            value = getattr(getattr(balance, name), modality)
            if value < 0:
                yield f"balance.{name}.{modality} is {value}, but must be at least 0"
    yield from _global_entropy_problems(run)
    yield from _load_weight_problems(run)
    yield from _bias_problems(run)


def _global_entropy_problems(run: RunConfig) -> Iterator[str]:
    targets = run.balance.global_entropy_experts
    for index, (modality, target) in enumerate((("image", targets.image), ("text", targets.text))):
        pool = run.moe.pool(index)
        pool_size = pool.stop - pool.start
        setting = f"balance.global_entropy_experts.{modality} is {target:g}"
        if 0 < target < 1:
            yield (
                f"{setting}, but below 1 the loss is always 0; use at least 1, or 0 for the default"
            )
        if target > pool_size:
            yield f"{setting}, more than the {pool_size} experts for this modality"


def _load_weight_problems(run: RunConfig) -> Iterator[str]:
    balance = run.balance
    if balance.load_weight and not run.moe.uses_noise:
        yield (
            f"balance.load_weight is {balance.load_weight}, but the load loss needs noise on the "
            f"logits; set moe.routing=noisy_top_k, or balance.load_weight=0"
        )
    if balance.load_weight and balance.uses_bias:
        yield (
            f"balance.load_weight is {balance.load_weight}, but the expected load is computed "
            f"without balance.bias ({balance.bias}), which affects the selection; set "
            f"balance.bias=none, or balance.load_weight=0"
        )


def _bias_problems(run: RunConfig) -> Iterator[str]:
    balance = run.balance
    if balance.bias_per_modality and not balance.uses_bias:
        yield (
            "balance.bias_per_modality is true, but balance.bias is none; set balance.bias=sign or "
            "zscore, or balance.bias_per_modality=false"
        )
    if balance.bias_rate <= 0:
        yield (
            f"balance.bias_rate is {balance.bias_rate}, but must be above 0 (balance.bias=none "
            f"turns biases off)"
        )
    if not 0 <= balance.bias_freeze_ratio <= 1:
        yield f"balance.bias_freeze_ratio is {balance.bias_freeze_ratio}, but must be in 0..1"
