"""Biases that even out the load without a loss: added to the scores for the choice only, moved
after each step.

Shapes: E experts, M modalities; a bias is `[1, E]` when both modalities share it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pretrain.config.experts import BalanceConfig, MoEConfig


class SelectionBias(nn.Module):
    """The biases of one layer, float32 `[M or 1, experts]`; a buffer that stays float32 whatever
    the module becomes."""

    def __init__(self, rows: int, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(rows, num_experts))
        self.value: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelectionBias:
        # A cast of the whole model to bfloat16 would round away every update of 1e-3.
        self.value = self.value.to(fn(self.value).device)
        return self


def make_bias(moe: MoEConfig, balance: BalanceConfig) -> SelectionBias | None:
    """Biases of zero for a layer, or None when the run has none."""
    if balance.bias == "none":
        return None
    return SelectionBias(2 if balance.bias_per_modality else 1, moe.num_experts)


def bias_rate(balance: BalanceConfig, step: int, total_steps: int) -> float:
    """The rate of step `step` (the first is 0): 0 in the last `bias_freeze_ratio` of the run."""
    frozen = step >= total_steps * (1 - balance.bias_freeze_ratio)
    return 0.0 if frozen or balance.bias == "none" else balance.bias_rate


def moved_bias(
    bias: Tensor, choices_ME: Tensor, moe: MoEConfig, balance: BalanceConfig, rate: float
) -> Tensor:
    """The biases after a step in which the global batch made these choices.

    `sign`: b_e -= rate x sign(load_e - mean) (Wang et al. 2024, arXiv:2408.15664). `zscore`: b_e -=
    rate x (load_e - mean) / deviation, which moves an expert the more, the further it is off. With
    pools, mean and deviation are those of the expert's pool; with one bias per modality, the load
    is that modality's.

    Args:
        bias: Before, `[M or 1, experts]`.
        choices_ME: Choices in the global batch, before capacity.
        moe: Pools.
        balance: Which rule, and one bias for each modality or not.
        rate: Of this step.
    """
    load = choices_ME.to(torch.float64)
    if not balance.bias_per_modality:
        load = load.sum(dim=0, keepdim=True)
    push = torch.zeros_like(load)
    for pool in moe.pool_slices():
        off = load[:, pool] - load[:, pool].mean(dim=1, keepdim=True)
        if balance.bias == "sign":
            push[:, pool] = off.sign()
        else:
            push[:, pool] = off / off.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-9)
    return (bias - rate * push).to(bias.dtype)
