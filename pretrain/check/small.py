"""A run scaled down: the same options of routing and balancing on fewer blocks, experts and
numbers. Pure.

What decides *how* something is computed stays: which choice, score, gate, capacity, pools, biases,
terms and weights, the optimizer, the profile. What decides *how much* becomes so small that a
laptop trains it in no time.
"""

from __future__ import annotations

import math
from dataclasses import replace

from pretrain.config.experts import BalanceConfig, ByModality, MoEConfig
from pretrain.config.schema import ModelConfig, RunConfig

BLOCKS, PATCH, SIDE, TEXT, VOCABULARY = 4, 8, 16, 16, 64


def shrink(run: RunConfig) -> RunConfig:
    """The run with a small model."""
    moe = _experts(run.moe, run.model)
    return replace(
        run, model=_model(run.model), moe=moe, balance=_balance(run.balance, run.moe, moe)
    )


def _model(model: ModelConfig) -> ModelConfig:
    blocks = min(model.num_layers, BLOCKS)
    fusion = min(max(1, round(model.fusion_layer * blocks / model.num_layers)), blocks - 1)
    return replace(
        model,
        width=32,
        num_heads=2,
        pool_heads=2,
        ffn_width=48,
        embed_dim=16,
        num_layers=blocks,
        fusion_layer=fusion,
        image_size=SIDE,
        patch_size=PATCH,
        context_length=min(model.context_length, TEXT),
        vocab_size=min(model.vocab_size, VOCABULARY),
    )


def _experts(moe: MoEConfig, model: ModelConfig) -> MoEConfig:
    """At most 8 experts, which the same powers of two divide; experts in the same kinds of
    blocks."""
    count = small_count(moe.num_experts)
    image = (
        max(1, round(moe.image_pool * count / moe.num_experts)) if moe.pools == "modality" else 0
    )
    most = min(image, count - image) if image else count
    chosen = max(1, min(moe.top_k, most, max(2, count // 2)))
    blocks = min(model.num_layers, BLOCKS)
    small = replace(
        moe,
        num_experts=count,
        top_k=chosen,
        expert_width=16,
        image_experts=image if moe.image_experts else 0,
        capacity_group_size=min(moe.capacity_group_size, 2),
        start=min(moe.start, 1),
        every=min(moe.every, 2),
        stop=-1 if moe.stop < 0 else max(2, round(moe.stop * blocks / model.num_layers)),
    )
    sparse, wanted = moe.blocks(model.num_layers), small.blocks(blocks)
    if not sparse:
        return replace(small, start=blocks, stop=-1)
    fusion = _model(model).fusion_layer
    fused = any(block >= model.fusion_layer for block in sparse)
    if not wanted or (fused and not any(block >= fusion for block in wanted)):
        return replace(small, every=1, stop=-1)
    return small


def small_count(experts: int) -> int:
    """At most 8 experts that 2, 4 and 8 divide exactly when they divide `experts`."""
    if experts <= 8:
        return experts
    return {8: 8, 4: 4, 2: 6, 1: 5}[math.gcd(experts, 8)]


def _balance(balance: BalanceConfig, moe: MoEConfig, small: MoEConfig) -> BalanceConfig:
    """Numbers of experts that are asked for shrink with the pools that hold them."""

    def fewer(wanted: float, modality: int) -> float:
        old, new = (len(range(of.num_experts)[of.pool(modality)]) for of in (moe, small))
        return max(1.0, wanted * new / old) if wanted else 0.0

    wanted = balance.global_entropy_experts
    return replace(
        balance,
        global_entropy_experts=ByModality(image=fewer(wanted.image, 0), text=fewer(wanted.text, 1)),
    )
