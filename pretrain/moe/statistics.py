"""Statistics of a router's decisions, returned by the layer for losses and metrics.

Every field is a sum over tokens, so fields can be added over micro-batches and ranks. The auxiliary
losses (`pretrain.moe.auxiliary`) are functions of the fields that have a gradient.

Shapes: T tokens, E experts, M modalities (0 image, 1 text), L MoE layers. The statistics of a
single layer have no leading L.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config.experts import MoEConfig
from pretrain.moe.routing import Routing, Scores, count_assignments, mask_other_pool, mask_pools
from pretrain.moe.tokens import MODALITIES, TokenBatch

__all__ = ["GRADIENT_FIELDS", "MODALITIES", "RouterStats", "router_stats", "stack_stats"]


class RouterStats(NamedTuple):
    """Sums over tokens; float32, or int64 for counts."""

    prob_sum_ME: Tensor
    """Gate scores, normalized over the experts. With gradient."""
    load_sum_ME: Tensor
    """Probability of being selected if the noise is resampled. With gradient; zeros if not
    requested."""
    z_sum_M: Tensor
    """Squared logsumexp of the logits before temperature, over the experts of the token's pool.
    With gradient."""
    entropy_sum_M: Tensor
    """Entropy (nats) of each token's normalized scores. With gradient."""
    expert_l1: Tensor
    """Sum of absolute weights of the routed experts on this rank, scalar. With gradient; 0 if not
    requested."""
    router_l1: Tensor
    """Sum of absolute weights of the router, scalar. With gradient; 0 if not requested."""
    assignments_ME: Tensor
    """Number of assignments, dropped ones included, int64."""
    kept_ME: Tensor
    """Number of assignments within the capacity, int64."""
    top1_ME: Tensor
    """Number of tokens for which the expert has the largest score, int64."""
    top1_prob_sum_M: Tensor
    """Largest normalized score of each token."""
    coactivation_EE: Tensor
    """Number of tokens assigned to both experts, int64; `[0, 0]` if not requested."""


GRADIENT_FIELDS = (
    "prob_sum_ME",
    "load_sum_ME",
    "z_sum_M",
    "entropy_sum_M",
    "expert_l1",
    "router_l1",
)


def router_stats(
    logits_TE: Tensor,
    scored: Scores,
    routing: Routing,
    tokens: TokenBatch,
    config: MoEConfig,
    *,
    load: bool = False,
    expert_l1: Tensor | None = None,
    router_l1: Tensor | None = None,
) -> RouterStats:
    """Compute the statistics of one layer.

    Args:
        logits_TE: Router logits before temperature and pool masking, float32.
        scored: Gate scores. Sigmoid scores are normalized over the experts here, as in DeepSeek-V3
            (arXiv:2412.19437, section 2.1.2).
        routing: The assignments.
        tokens: Metadata of the tokens; `coactivation` selects whether coactivations are counted.
        config: Configuration of the layer.
        load: Also compute the smooth load (`routing: noisy_top_k`).
        expert_l1: Sum of the experts' absolute weights, if requested.
        router_l1: Sum of the router's absolute weights, if requested.
    """
    split, num_experts = tokens.num_patch_tokens, scored.scores_TE.shape[1]
    probs_TE = scored.scores_TE
    if config.score_func == "sigmoid":
        probs_TE = probs_TE / probs_TE.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    # The clamp keeps the gradient finite where a probability is 0.
    entropy_T = -(probs_TE * probs_TE.clamp(min=1e-20).log()).sum(dim=-1)
    z_T = torch.logsumexp(mask_pools(logits_TE, config, split), dim=-1).square()

    with torch.no_grad():
        top1_prob_T, top1_T = mask_other_pool(probs_TE, scored, config).max(dim=-1)
        coactivation_EE = torch.zeros(0, 0, dtype=torch.int64, device=probs_TE.device)
        if tokens.coactivation:
            coactivation_EE = _coactivation(routing, len(probs_TE), num_experts)

    zero = probs_TE.new_zeros(())
    load_ME = probs_TE.new_zeros(len(MODALITIES), num_experts)
    if load and scored.noisy_logits_TE is not None:
        load_ME = _sum_by_modality(smooth_load(scored, config), split)

    return RouterStats(
        prob_sum_ME=_sum_by_modality(probs_TE, split),
        load_sum_ME=load_ME,
        z_sum_M=_sum_by_modality(z_T, split),
        entropy_sum_M=_sum_by_modality(entropy_T, split),
        expert_l1=zero if expert_l1 is None else expert_l1,
        router_l1=zero if router_l1 is None else router_l1,
        assignments_ME=routing.assignments_ME,
        kept_ME=routing.kept_ME,
        top1_ME=count_assignments(top1_T, split, num_experts),
        top1_prob_sum_M=_sum_by_modality(top1_prob_T, split),
        coactivation_EE=coactivation_EE,
    )


def smooth_load(scored: Scores, config: MoEConfig) -> Tensor:
    """Probability that an expert is selected if only its own noise is resampled, `[tokens,
    experts]`.

    That is P(logit + std x n > the k-th largest noisy logit) for a standard normal n.

    Source: Riquelme et al. 2021 (V-MoE), arXiv:2106.05974, appendix A, after Shazeer et al. 2017.
    """
    assert scored.noisy_logits_TE is not None
    threshold_T1 = scored.noisy_logits_TE.topk(config.top_k, dim=-1).values[:, -1:]
    required_noise_TE = (threshold_T1 - scored.logits_TE) / config.logit_noise_std
    return 0.5 * torch.erfc(required_noise_TE * 0.5**0.5)


def stack_stats(
    layers: Sequence[RouterStats], num_experts: int, device: torch.device
) -> RouterStats:
    """Stack the statistics of all layers, `[layers, ...]`; without layers, empty tensors."""
    if layers:
        return RouterStats(*(torch.stack(fields) for fields in zip(*layers, strict=True)))
    empty_LME = torch.zeros(0, len(MODALITIES), num_experts, device=device)
    empty_LM, empty_L = empty_LME[:, :, 0], empty_LME[:, 0, 0]
    counts_LME = empty_LME.to(torch.int64)
    return RouterStats(
        prob_sum_ME=empty_LME,
        load_sum_ME=empty_LME,
        z_sum_M=empty_LM,
        entropy_sum_M=empty_LM,
        expert_l1=empty_L,
        router_l1=empty_L,
        assignments_ME=counts_LME,
        kept_ME=counts_LME,
        top1_ME=counts_LME,
        top1_prob_sum_M=empty_LM,
        coactivation_EE=torch.zeros(0, 0, 0, dtype=torch.int64, device=device),
    )


def _sum_by_modality(values: Tensor, split: int) -> Tensor:
    """Sums over the patch tokens and over the text tokens."""
    return torch.stack([values[:split].sum(dim=0), values[split:].sum(dim=0)])


def _coactivation(routing: Routing, num_tokens: int, num_experts: int) -> Tensor:
    """Number of tokens assigned to each pair of experts, int64 `[experts, experts]`; the diagonal
    counts the tokens of each expert."""
    is_assigned_TE = torch.zeros(num_tokens, num_experts + 1, device=routing.expert_ids_N.device)
    token_N = routing.token_N
    if token_N is None:
        token_N = torch.arange(num_tokens, device=is_assigned_TE.device)
        token_N = token_N.repeat_interleave(routing.k)
    is_assigned_TE[token_N, routing.expert_ids_N] = 1.0
    is_assigned_TE = is_assigned_TE[:, :num_experts]
    return (is_assigned_TE.t() @ is_assigned_TE).round().to(torch.int64)
