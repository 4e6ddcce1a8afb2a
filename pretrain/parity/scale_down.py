"""Scales a run down: the same routing and balancing options with fewer layers and experts.

Settings that decide *how* something is computed stay: routing, score function, router input,
capacity, expert pools, biases, loss terms and their weights, optimizer and DeepSpeed profile.
Settings that decide *how much* is computed become so small that a laptop trains the run in seconds.
"""

from __future__ import annotations

import math
from dataclasses import replace

from pretrain.config.experts import BalanceConfig, MoEConfig, PerModality
from pretrain.config.schema import ModelConfig, RunConfig

MAX_LAYERS, PATCH_SIZE, IMAGE_SIZE, MAX_CONTEXT, MAX_VOCABULARY = 4, 8, 16, 16, 64


def shrink(run: RunConfig) -> RunConfig:
    """The run with a small model."""
    moe = _experts(run.moe, run.model)
    return replace(
        run, model=_model(run.model), moe=moe, balance=_balance(run.balance, run.moe, moe)
    )


def _model(model: ModelConfig) -> ModelConfig:
    layers = min(model.num_layers, MAX_LAYERS)
    fusion = min(max(1, round(model.fusion_layer * layers / model.num_layers)), layers - 1)
    return replace(
        model,
        width=32,
        num_heads=2,
        pool_heads=2,
        ffn_width=48,
        embed_dim=16,
        num_layers=layers,
        fusion_layer=fusion,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        context_length=min(model.context_length, MAX_CONTEXT),
        vocab_size=min(model.vocab_size or MAX_VOCABULARY, MAX_VOCABULARY),
    )


def _experts(moe: MoEConfig, model: ModelConfig) -> MoEConfig:
    """At most 8 experts, in the same kinds of layers (before and after fusion)."""
    layers = min(model.num_layers, MAX_LAYERS)
    small = _fewer_experts(moe, model.num_layers, layers)

    sparse, small_sparse = moe.blocks(model.num_layers), small.blocks(layers)
    if not sparse:
        return replace(small, start=layers, stop=-1)

    fusion = _model(model).fusion_layer
    fused = any(block >= model.fusion_layer for block in sparse)
    if not small_sparse or (fused and not any(block >= fusion for block in small_sparse)):
        return replace(small, every=1, stop=-1)
    return small


def _fewer_experts(moe: MoEConfig, num_layers: int, layers: int) -> MoEConfig:
    """The settings for `layers` layers instead of `num_layers`."""
    experts = small_num_experts(moe.num_experts)
    image_experts = 0
    if moe.pools == "modality":
        image_experts = max(1, round(moe.num_image_experts * experts / moe.num_experts))
    max_top_k = min(image_experts, experts - image_experts) if image_experts else experts

    return replace(
        moe,
        num_experts=experts,
        top_k=max(1, min(moe.top_k, max_top_k, max(2, experts // 2))),
        expert_width=16,
        image_experts=image_experts if moe.image_experts else 0,
        capacity_group_size=min(moe.capacity_group_size, 2),
        start=min(moe.start, 1),
        every=min(moe.every, 2),
        stop=-1 if moe.stop < 0 else max(2, round(moe.stop * layers / num_layers)),
    )


def small_num_experts(experts: int) -> int:
    """At most 8 experts, divisible by 2, 4 or 8 exactly if `experts` is."""
    if experts <= 8:
        return experts
    return {8: 8, 4: 4, 2: 6, 1: 5}[math.gcd(experts, 8)]


def _balance(balance: BalanceConfig, moe: MoEConfig, small: MoEConfig) -> BalanceConfig:
    """Scales the target number of experts of each modality with the size of its pool."""

    def scaled(target: float, modality: int) -> float:
        if not target:
            return 0.0
        before, after = (
            len(range(config.num_experts)[config.pool(modality)]) for config in (moe, small)
        )
        return max(1.0, target * after / before)

    targets = balance.global_entropy_experts
    return replace(
        balance,
        global_entropy_experts=PerModality(
            image=scaled(targets.image, 0), text=scaled(targets.text, 1)
        ),
    )
