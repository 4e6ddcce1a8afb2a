"""Expert biases for load balancing without an auxiliary loss: added to the gate scores for expert
selection only, and updated after each optimizer step.

Shapes: E experts, M modalities; a bias is `[1, E]` if both modalities share it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pretrain.config.experts import BalanceConfig, MoEConfig


class ExpertBias(nn.Module):
    """The expert biases of one layer: a float32 buffer `[M or 1, experts]` that stays float32 when
    the module is cast."""

    def __init__(self, rows: int, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(rows, num_experts))
        self.value: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertBias:
        # In bfloat16 every update of 1e-3 would be rounded away: follow device moves only.
        self.value = self.value.to(fn(self.value).device)
        return self


def build_expert_bias(moe: MoEConfig, balance: BalanceConfig) -> ExpertBias | None:
    """Zero-initialized biases of a layer, or None if `balance.bias` is `none`."""
    if not balance.uses_bias:
        return None
    return ExpertBias(2 if balance.bias_per_modality else 1, moe.num_experts)


def bias_rate(balance: BalanceConfig, step: int, total_steps: int) -> float:
    """Update rate at `step` (0-based); 0 during the last `bias_freeze_ratio` of the run."""
    frozen = step >= total_steps * (1 - balance.bias_freeze_ratio)
    return 0.0 if frozen or not balance.uses_bias else balance.bias_rate


def updated_bias(
    bias: Tensor, assignments_ME: Tensor, moe: MoEConfig, balance: BalanceConfig, rate: float
) -> Tensor:
    """The biases after a step, given the assignments of the global batch.

    `sign`: b_e -= rate x sign(load_e - mean). `zscore`: b_e -= rate x (load_e - mean) / std; the
    update grows with the distance from the mean load. With expert pools, mean and standard
    deviation are those of the expert's pool; with one bias per modality, the load is that of the
    modality.

    Args:
        bias: Before the step, `[M or 1, experts]`.
        assignments_ME: Assignments in the global batch, before the capacity limit.
        moe: Expert pools.
        balance: Update rule, and whether there is one bias per modality.
        rate: Update rate of this step (`bias_rate`).

    Sources: sign update: Wang et al. 2024 (auxiliary-loss-free load balancing), arXiv:2408.15664,
    also used in DeepSeek-V3, arXiv:2412.19437; z-score update: MoE-ViE 2026; one bias per modality:
    DeepSeek-V4.1-Flash 2026.
    """
    load = assignments_ME.to(torch.float64)
    if not balance.bias_per_modality:
        load = load.sum(dim=0, keepdim=True)

    direction = torch.zeros_like(load)
    for pool in moe.pool_slices():
        deviation = load[:, pool] - load[:, pool].mean(dim=1, keepdim=True)
        if balance.bias == "sign":
            direction[:, pool] = deviation.sign()
        else:
            std = deviation.square().mean(dim=1, keepdim=True).sqrt()
            direction[:, pool] = deviation / std.clamp(min=1e-9)
    return (bias - rate * direction).to(bias.dtype)
