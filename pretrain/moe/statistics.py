"""What a router did, as values that the layer returns and the losses and dashboards use.

Every field is a sum over tokens, so fields add up over micro-batches and ranks. Fields with
gradient are what the auxiliary losses are functions of (`pretrain.moe.auxiliary`).

Shapes: T tokens, E experts, M modalities (0 image, 1 text), L MoE layers. In a layer's own
statistics the L in front is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config.experts import MoEConfig
from pretrain.moe.routing import Routing, Scores, count_choices, keep_to_pools, own_pool
from pretrain.moe.tokens import MODALITIES, RouterTokens

__all__ = ["GRADIENT_FIELDS", "MODALITIES", "RouterStats", "router_stats", "stack_stats"]


class RouterStats(NamedTuple):
    """Sums over tokens; float32, or int64 for counts."""

    prob_sum_ME: Tensor
    """Gate scores, normalized over the experts. With gradient."""
    load_sum_ME: Tensor
    """Probability of being chosen when the noise is drawn anew. With gradient; zeros where not
    asked for."""
    z_sum_M: Tensor
    """logsumexp^2 of the logits before temperature, with pools over the token's own. With
    gradient."""
    entropy_sum_M: Tensor
    """Entropy (nats) of each token's normalized scores. With gradient."""
    expert_l1: Tensor
    """Sum of |weight| over the routed experts that are held here, scalar. With gradient; 0 where
    not asked for."""
    router_l1: Tensor
    """The same of the router."""
    choices_ME: Tensor
    """Token choices, int64."""
    kept_ME: Tensor
    """Choices that found a place under the capacity, int64."""
    first_ME: Tensor
    """Tokens for which the expert has the largest score, int64."""
    top_sum_M: Tensor
    """Largest normalized score."""
    coactivation_EE: Tensor
    """Tokens that chose both experts, int64; `[0, 0]` where not asked for."""


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
    tokens: RouterTokens,
    config: MoEConfig,
    *,
    load: bool = False,
    expert_l1: Tensor | None = None,
    router_l1: Tensor | None = None,
) -> RouterStats:
    """Sum what the router did.

    Args:
        logits_TE: Router logits before temperature and pools, float32.
        scored: What the choice was made from. Sigmoid scores are normalized over the experts here,
            as in DeepSeek-V3 (arXiv:2412.19437, section 2.1.2).
        routing: The choice.
        tokens: Knows which tokens are patches, and whether co-choices are counted.
        config: Of the layer.
        load: Also sum the smooth load (`choice: noisy`).
        expert_l1: Sum of absolute weights, where asked for.
        router_l1: The same of the router.
    """
    split, num_experts = tokens.num_patch_tokens, scored.scores_TE.shape[1]
    probs_TE = scored.scores_TE
    if config.score_func == "sigmoid":
        probs_TE = probs_TE / probs_TE.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    # The clamp keeps the gradient finite where a probability is 0.
    entropy_T = -(probs_TE * probs_TE.clamp(min=1e-20).log()).sum(dim=-1)
    z_T = torch.logsumexp(keep_to_pools(logits_TE, config, split), dim=-1).square()
    with torch.no_grad():
        top_T, first_T = own_pool(probs_TE, scored, config).max(dim=-1)
        coactivation = torch.zeros(0, 0, dtype=torch.int64, device=probs_TE.device)
        if tokens.coactivation:
            coactivation = _coactivation(routing, len(probs_TE), num_experts)
    zero = probs_TE.new_zeros(())
    load_ME = probs_TE.new_zeros(len(MODALITIES), num_experts)
    if load and scored.noisy_logits_TE is not None:
        load_ME = _by_modality(smooth_load(scored, config), split)
    return RouterStats(
        prob_sum_ME=_by_modality(probs_TE, split),
        load_sum_ME=load_ME,
        z_sum_M=_by_modality(z_T, split),
        entropy_sum_M=_by_modality(entropy_T, split),
        expert_l1=zero if expert_l1 is None else expert_l1,
        router_l1=zero if router_l1 is None else router_l1,
        choices_ME=routing.choices_ME,
        kept_ME=routing.kept_ME,
        first_ME=count_choices(first_T, split, num_experts),
        top_sum_M=_by_modality(top_T, split),
        coactivation_EE=coactivation,
    )


def smooth_load(scored: Scores, config: MoEConfig) -> Tensor:
    """P(expert is chosen when only its own noise is drawn anew), `[tokens, experts]`.

    That is P(logit + deviation x n > the k-th largest noisy logit) for a standard normal n.

    Source: Riquelme et al. 2021 (V-MoE), arXiv:2106.05974, appendix A, after Shazeer et al. 2017.
    """
    assert scored.noisy_logits_TE is not None
    threshold_T1 = scored.noisy_logits_TE.topk(config.top_k, dim=-1).values[:, -1:]
    needed_TE = (threshold_T1 - scored.logits_TE) / config.noise_deviation
    return 0.5 * torch.erfc(needed_TE * 0.5**0.5)


def stack_stats(
    layers: Sequence[RouterStats], num_experts: int, device: torch.device
) -> RouterStats:
    """The statistics of all layers, `[layers, ...]`; of none, tensors without elements."""
    if layers:
        return RouterStats(*(torch.stack(parts) for parts in zip(*layers, strict=True)))
    grid = torch.zeros(0, len(MODALITIES), num_experts, device=device)
    row, one = grid[:, :, 0], grid[:, 0, 0]
    counts = grid.to(torch.int64)
    coactivation = torch.zeros(0, 0, 0, dtype=torch.int64, device=device)
    return RouterStats(grid, grid, row, row, one, one, counts, counts, counts, row, coactivation)


def _by_modality(values: Tensor, split: int) -> Tensor:
    """Sums over the patches and over the text tokens."""
    return torch.stack([values[:split].sum(dim=0), values[split:].sum(dim=0)])


def _coactivation(routing: Routing, num_tokens: int, num_experts: int) -> Tensor:
    """Tokens by pair of experts that they chose, int64 `[experts, experts]`; each token with itself
    on the diagonal."""
    chosen_TE = torch.zeros(num_tokens, num_experts + 1, device=routing.expert_ids_N.device)
    token_N = routing.token_N
    if token_N is None:
        token_N = torch.arange(num_tokens, device=chosen_TE.device).repeat_interleave(routing.k)
    chosen_TE[token_N, routing.expert_ids_N] = 1.0
    chosen_TE = chosen_TE[:, :num_experts]
    return (chosen_TE.t() @ chosen_TE).round().to(torch.int64)
