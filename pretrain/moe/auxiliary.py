"""Auxiliary losses of the routers: functions of the global batch, with exact gradients for any
data-parallel split.

Every term is a function g(S) of statistics S that are sums over all tokens of the global batch. S
is all-reduced over ranks and micro-batches first; g is then evaluated and differentiated once, on
small tensors. Each rank adds to its loss a term that is linear in its local sums:

    local term = <c, S_rank>,  c = d(sum_i weight_i g_i) / dS  evaluated at the global S

Summed over ranks, the local terms have the gradient of sum_i weight_i g_i(S) for any split. The
reported *values* are g_i(S), which are the same on every rank.

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
    """Unweighted value, float64 scalar."""
    weight: float
    """Its weight in the total loss."""


class LinearizedLosses(NamedTuple):
    """All auxiliary losses of a step, linearized at the global statistics."""

    values: dict[str, Tensor]
    """Unweighted value of each term, without gradient."""
    weights: dict[str, float]
    """Weight of each term in the total loss."""
    coefficients: dict[str, Tensor]
    """Derivative of the weighted sum of all terms with respect to each field of `RouterStats`; same
    shape as the field."""

    def local_term(self, local_stats: RouterStats) -> Tensor:
        """Contribution of one rank's statistics to its loss; a scalar with gradient."""
        products = []
        for name, coefficient in self.coefficients.items():
            local_sums = getattr(local_stats, name)
            products.append((coefficient.to(local_sums.dtype) * local_sums).sum())
        return torch.stack(products).sum()


def linearize(
    total: RouterStats,
    tokens_M: Tensor,
    moe: MoEConfig,
    balance: BalanceConfig,
    *,
    expert_copies: float = 1.0,
    router_copies: float = 1.0,
) -> LinearizedLosses:
    """Evaluate and differentiate all auxiliary losses at the statistics of the global batch.

    Args:
        total: Sums over the global batch, float64, `[layers, ...]`.
        tokens_M: Number of tokens of each modality, float64.
        moe: Experts and expert pools.
        balance: Weights of the terms.
        expert_copies: How many times `total.expert_l1` counts each expert: once per replica and
            micro-batch.
        router_copies: The same for `total.router_l1`.
    """
    leaves = {name: getattr(total, name).detach().requires_grad_() for name in GRADIENT_FIELDS}
    gradients: tuple[Tensor | None, ...] = (None,) * len(leaves)

    with torch.enable_grad():
        terms = auxiliary_terms(
            total._replace(**leaves), tokens_M, moe, balance, expert_copies, router_copies
        )
        weighted = [term.weight * term.value for term in terms.values() if term.weight]
        if weighted and total.z_sum_M.numel():
            weighted_sum = torch.stack(weighted).sum()
            gradients = torch.autograd.grad(weighted_sum, list(leaves.values()), allow_unused=True)

    coefficients = {}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        coefficients[name] = torch.zeros_like(leaf) if gradient is None else gradient

    return LinearizedLosses(
        {name: term.value.detach() for name, term in terms.items()},
        {name: term.weight for name, term in terms.items()},
        {name: coefficient.detach() for name, coefficient in coefficients.items()},
    )


def auxiliary_terms(
    total: RouterStats,
    tokens_M: Tensor,
    moe: MoEConfig,
    balance: BalanceConfig,
    expert_copies: float = 1.0,
    router_copies: float = 1.0,
) -> dict[str, Term]:
    """All terms with a nonzero weight; `balance` and `router_z` are always included.

    Terms are means over the MoE layers, except the L1 terms, which are sums. Arguments as for
    `linearize`.

    Sources: router z-loss: Zoph et al. 2022 (ST-MoE), arXiv:2202.08906; importance and load:
    Riquelme et al. 2021 (V-MoE), arXiv:2106.05974, appendix A; local and global entropy: Mustafa et
    al. 2022 (LIMoE), arXiv:2206.02770.
    """
    num_tokens = tokens_M.sum().clamp(min=1)
    balance_L = balance_loss(total.prob_sum_ME, total.assignments_ME, tokens_M, moe)
    router_z_L = total.z_sum_M.sum(dim=1) / num_tokens

    terms = {
        "balance": Term(_mean(balance_L), balance.balance_weight),
        "router_z": Term(_mean(router_z_L), balance.router_z_weight),
    }
    if balance.importance_weight:
        importance_L = squared_cv(total.prob_sum_ME.sum(dim=1), moe)
        terms["importance"] = Term(_mean(importance_L), balance.importance_weight)
    if balance.load_weight:
        load_L = squared_cv(total.load_sum_ME.sum(dim=1), moe)
        terms["load"] = Term(_mean(load_L), balance.load_weight)

    terms |= _entropy_terms(total, tokens_M, moe, balance)

    if balance.expert_l1_weight:
        terms["expert_l1"] = Term(total.expert_l1.sum() / expert_copies, balance.expert_l1_weight)
    if balance.router_l1_weight:
        terms["router_l1"] = Term(total.router_l1.sum() / router_copies, balance.router_l1_weight)
    return terms


def _entropy_terms(
    total: RouterStats, tokens_M: Tensor, moe: MoEConfig, balance: BalanceConfig
) -> dict[str, Term]:
    """LIMoE's local and global entropy losses of each modality that has a weight for them."""
    terms = {}
    for index, modality in enumerate(MODALITIES):
        num_tokens = tokens_M[index].clamp(min=1)
        local_weight = getattr(balance.local_entropy_weight, modality)
        global_weight = getattr(balance.global_entropy_weight, modality)

        if local_weight:
            local_L = total.entropy_sum_M[:, index] / num_tokens
            terms[f"local_entropy_{modality}"] = Term(_mean(local_L), local_weight)
        if global_weight:
            mean_LE = total.prob_sum_ME[:, index] / num_tokens
            global_L = global_entropy_loss(mean_LE, target_num_experts(balance, moe, index))
            # Without tokens of this modality, mean_LE is all zeros, which is not a distribution.
            terms[f"global_entropy_{modality}"] = Term(
                _mean(global_L) * (tokens_M[index] > 0), global_weight
            )
    return terms


def balance_loss(
    prob_sum_LME: Tensor, assignments_LME: Tensor, tokens_M: Tensor, moe: MoEConfig
) -> Tensor:
    """Load-balancing loss of each layer: 1.0 for uniform routing, `experts / k` if all tokens are
    routed to the same k experts.

    E x sum_e f_e P_e, where f_e is the fraction of assignments that go to expert e and P_e its mean
    gate probability. With one expert pool per modality, the result is the mean over the pools that
    have tokens; each pool uses its own experts and tokens.

    Args:
        prob_sum_LME: Gate probabilities summed over tokens, `[layers, modalities, experts]`; the
            gradient flows through these.
        assignments_LME: Number of assignments, `[layers, modalities, experts]`; constants.
        tokens_M: Number of tokens of each modality.
        moe: Expert pools.

    Returns:
        `[layers]`.

    Source: Fedus et al. 2021 (Switch Transformer), arXiv:2101.03961, equations 4-6, for any top-k.
    """
    if moe.pools == "shared":
        return _pool_balance_loss(
            prob_sum_LME.sum(dim=1), assignments_LME.sum(dim=1), tokens_M.sum()
        )
    pool_losses = []
    for modality in (0, 1):
        pool = moe.pool(modality)
        pool_losses.append(
            _pool_balance_loss(
                prob_sum_LME[:, modality, pool],
                assignments_LME[:, modality, pool],
                tokens_M[modality],
            )
        )
    return torch.stack(pool_losses).sum(dim=0) / (tokens_M > 0).sum().clamp(min=1)


def _pool_balance_loss(prob_sum_LE: Tensor, assignments_LE: Tensor, num_tokens: Tensor) -> Tensor:
    fraction_LE = assignments_LE / assignments_LE.sum(dim=-1, keepdim=True).clamp(min=1)
    num_experts = prob_sum_LE.shape[-1]
    return num_experts * (fraction_LE * prob_sum_LE).sum(dim=-1) / num_tokens.clamp(min=1)


def squared_cv(sums_LE: Tensor, moe: MoEConfig) -> Tensor:
    """Squared coefficient of variation over the experts of each layer, `[layers]`; mean over the
    expert pools. 0 for uniform load.

    Source: Riquelme et al. 2021 (V-MoE), arXiv:2106.05974, appendix A.
    """
    per_pool = []
    for pool in moe.pool_slices():
        squared_mean_L = sums_LE[:, pool].mean(dim=1).square().clamp(min=1e-20)
        per_pool.append(_variance(sums_LE[:, pool]) / squared_mean_L)
    return torch.stack(per_pool).mean(dim=0)


def _variance(x_LE: Tensor) -> Tensor:
    return (x_LE - x_LE.mean(dim=1, keepdim=True)).square().mean(dim=1)


def global_entropy_loss(mean_LE: Tensor, target: float) -> Tensor:
    """max(0, log target - entropy) of each layer's mean distribution, `[layers]`: 0 if about
    `target` or more experts are used.

    Source: Mustafa et al. 2022 (LIMoE), arXiv:2206.02770, section 3.2.
    """
    # The clamp keeps the gradient finite where a probability is 0.
    entropy_L = -(mean_LE * mean_LE.clamp(min=1e-20).log()).sum(dim=-1)
    return (math.log(target) - entropy_L).clamp(min=0)


def target_num_experts(balance: BalanceConfig, moe: MoEConfig, modality: int) -> float:
    """Minimum number of experts S that a modality should use: the configured value, or by default
    half of all experts for patches and a quarter for text, at most the size of its pool."""
    targets = (balance.global_entropy_experts.image, balance.global_entropy_experts.text)
    pool = moe.pool(modality)
    default = moe.num_experts / (2, 4)[modality]
    return targets[modality] or max(1.0, min(default, pool.stop - pool.start))


def _mean(per_layer_L: Tensor) -> Tensor:
    """Mean over the layers; 0 for a dense trunk."""
    return per_layer_L.sum() / max(1, per_layer_L.numel())
