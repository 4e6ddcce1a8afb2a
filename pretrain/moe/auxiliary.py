"""Losses that keep routers healthy, as functions of the global batch, with exact gradients on any
split.

Every term is a function g(S) of sums S over all tokens of the global batch. The sums are added up
over ranks and micro-batches first; there g is evaluated and differentiated once, on small tensors.
What a rank then adds to its loss is linear in its own sums:

    share = <c, S_rank>,  c = d(sum_i weight_i g_i) / dS  at the global S

Summed over the ranks it has the gradient of sum_i weight_i g_i(S), whatever the split. The *values*
are g_i(S) themselves, the same on every rank.

Shapes: E experts, L MoE layers, M modalities.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.moe.statistics import GRADIENT_FIELDS, MODALITIES, RouterStats


class Term(NamedTuple):
    """One auxiliary loss."""

    value: Tensor
    """Unweighted, float64 scalar."""
    weight: float


class Linearized(NamedTuple):
    """The terms of a step, and what each rank multiplies its sums with."""

    values: dict[str, Tensor]
    """Each term, unweighted, without gradient."""
    weights: dict[str, float]
    coefficients: dict[str, Tensor]
    """Derivative of the weighted sum of all terms, by field of `RouterStats`; of the field's
    shape."""

    def share(self, mine: RouterStats) -> Tensor:
        """What a rank adds to its loss for its own statistics; a scalar with their gradient."""
        parts = [
            (c.to(getattr(mine, name).dtype) * getattr(mine, name)).sum()
            for name, c in self.coefficients.items()
        ]
        return torch.stack(parts).sum()


def linearize(
    total: RouterStats,
    tokens_M: Tensor,
    moe: MoEConfig,
    balance: BalanceConfig,
    *,
    expert_copies: float = 1.0,
    router_copies: float = 1.0,
) -> Linearized:
    """Evaluate and differentiate all terms at the sums of the global batch.

    Args:
        total: Sums over the global batch, float64, `[layers, ...]`.
        tokens_M: Tokens of each modality, float64.
        moe: Experts and pools.
        balance: Weights.
        expert_copies: How often `total.expert_l1` counts each expert: in every copy, in every
            micro-batch.
        router_copies: The same for the routers.
    """
    leaves = {name: getattr(total, name).detach().requires_grad_() for name in GRADIENT_FIELDS}
    with torch.enable_grad():
        found = terms(
            total._replace(**leaves), tokens_M, moe, balance, expert_copies, router_copies
        )
        weighted = [term.weight * term.value for term in found.values() if term.weight]
        gradients: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if weighted and total.z_sum_M.numel():
            summed = torch.stack(weighted).sum()
            gradients = torch.autograd.grad(summed, list(leaves.values()), allow_unused=True)
    coefficients = {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }
    return Linearized(
        {name: term.value.detach() for name, term in found.items()},
        {name: term.weight for name, term in found.items()},
        {name: c.detach() for name, c in coefficients.items()},
    )


def terms(
    total: RouterStats,
    tokens_M: Tensor,
    moe: MoEConfig,
    balance: BalanceConfig,
    expert_copies: float = 1.0,
    router_copies: float = 1.0,
) -> dict[str, Term]:
    """Every term that has a weight, and always balance and z; means over the layers, the L1 terms
    sums."""
    tokens = tokens_M.sum().clamp(min=1)
    even_L = balance_loss(total.prob_sum_ME, total.choices_ME, tokens_M, moe)
    found = {
        "balance": Term(_mean(even_L), balance.balance_weight),
        "router_z": Term(_mean(total.z_sum_M.sum(dim=1) / tokens), balance.router_z_weight),
    }
    if balance.importance_weight:
        found["importance"] = Term(
            _mean(uneven(total.prob_sum_ME.sum(dim=1), moe)), balance.importance_weight
        )
    if balance.load_weight:
        found["load"] = Term(_mean(uneven(total.load_sum_ME.sum(dim=1), moe)), balance.load_weight)
    for index, modality in enumerate(MODALITIES):
        count = tokens_M[index].clamp(min=1)
        local = getattr(balance.local_entropy_weight, modality)
        if local:
            found[f"local_entropy_{modality}"] = Term(
                _mean(total.entropy_sum_M[:, index] / count), local
            )
        spread = getattr(balance.global_entropy_weight, modality)
        if spread:
            mean_LE = total.prob_sum_ME[:, index] / count
            short_L = short_of_experts(mean_LE, wanted_experts(balance, moe, index))
            # Without a token the mean is no distribution and says nothing.
            found[f"global_entropy_{modality}"] = Term(
                _mean(short_L) * (tokens_M[index] > 0), spread
            )
    if balance.expert_l1_weight:
        found["expert_l1"] = Term(total.expert_l1.sum() / expert_copies, balance.expert_l1_weight)
    if balance.router_l1_weight:
        found["router_l1"] = Term(total.router_l1.sum() / router_copies, balance.router_l1_weight)
    return found


def balance_loss(
    prob_sum_LME: Tensor, choices_LME: Tensor, tokens_M: Tensor, moe: MoEConfig
) -> Tensor:
    """Balance loss of each layer: 1.0 when experts are evenly used, `experts / k` when all tokens
    pick the same k.

    E x sum_e f_e P_e, with f_e the share of the choices that expert e got and P_e its mean gate
    score. With a pool for each modality it is the mean over the pools that have tokens, each with
    its own experts and tokens.

    Source: Fedus et al. 2021, arXiv:2101.03961, equations 4-6, for any top-k.
    """
    if moe.pools == "shared":
        return _pool_balance(prob_sum_LME.sum(dim=1), choices_LME.sum(dim=1), tokens_M.sum())
    pools = [
        _pool_balance(prob_sum_LME[:, m, moe.pool(m)], choices_LME[:, m, moe.pool(m)], tokens_M[m])
        for m in (0, 1)
    ]
    return torch.stack(pools).sum(dim=0) / (tokens_M > 0).sum().clamp(min=1)


def _pool_balance(prob_sum_LE: Tensor, choices_LE: Tensor, tokens: Tensor) -> Tensor:
    share_LE = choices_LE / choices_LE.sum(dim=-1, keepdim=True).clamp(min=1)
    return prob_sum_LE.shape[-1] * (share_LE * prob_sum_LE).sum(dim=-1) / tokens.clamp(min=1)


def uneven(sums_LE: Tensor, moe: MoEConfig) -> Tensor:
    """Squared coefficient of variation over the experts of each layer; mean over pools. 0 is even.

    Source: Riquelme et al. 2021 (V-MoE), arXiv:2106.05974, appendix A.
    """
    parts = [
        _variance(sums_LE[:, pool]) / sums_LE[:, pool].mean(dim=1).square().clamp(min=1e-20)
        for pool in moe.pool_slices()
    ]
    return torch.stack(parts).mean(dim=0)


def _variance(x_LE: Tensor) -> Tensor:
    return (x_LE - x_LE.mean(dim=1, keepdim=True)).square().mean(dim=1)


def short_of_experts(mean_LE: Tensor, wanted: float) -> Tensor:
    """max(0, log wanted - entropy) of each layer's mean distribution: 0 when at least about
    `wanted` experts are used.

    Source: Mustafa et al. 2022 (LIMoE), arXiv:2206.02770, section 3.2.
    """
    # The clamp keeps the gradient finite where a pool's probability is 0.
    entropy_L = -(mean_LE * mean_LE.clamp(min=1e-20).log()).sum(dim=-1)
    return (math.log(wanted) - entropy_L).clamp(min=0)


def wanted_experts(balance: BalanceConfig, moe: MoEConfig, modality: int) -> float:
    """S of a modality: what is set, or half of all experts for patches and a quarter for text,
    within its pool."""
    set_by_hand = (balance.global_entropy_experts.image, balance.global_entropy_experts.text)[
        modality
    ]
    pool = moe.pool(modality)
    usual = moe.num_experts / (2, 4)[modality]
    return set_by_hand or max(1.0, min(usual, pool.stop - pool.start))


def _mean(per_layer_L: Tensor) -> Tensor:
    """Mean over the layers; 0 for a dense trunk."""
    return per_layer_L.sum() / max(1, per_layer_L.numel())
