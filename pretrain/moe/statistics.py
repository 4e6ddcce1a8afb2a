"""What a router did, as values that the layer returns and the loss and the dashboards use.

Shapes: T tokens, E experts, K experts per token, M modalities (0 image, 1 text).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.moe.routing import count_ids

MODALITIES = ("image", "text")


class RouterStats(NamedTuple):
    """Sums over the tokens of one micro-batch; sums add over micro-batches and ranks."""

    choices_ME: Tensor
    """Token choices by modality and expert, int64."""
    prob_sum_E: Tensor
    """Gate probabilities summed over tokens, float32; gradient flows through these."""
    z_sum: Tensor
    """logsumexp(logits)^2 summed over tokens, float32; gradient flows through it."""
    entropy_sum_M: Tensor
    """Entropy (nats) of the gate distribution summed over the tokens of each modality, float32."""


def router_stats(logits_TE: Tensor, scores_TE: Tensor, expert_ids_TK: Tensor, modality_T: Tensor) -> RouterStats:
    """Sum what the router did.

    Args:
        logits_TE: Router logits, float32.
        scores_TE: Gate scores, float32; sigmoid scores are normalised over the experts first, as in
            DeepSeek-V3 (arXiv:2412.19437, section 2.1.2).
        expert_ids_TK: Chosen experts, int64.
        modality_T: 0 for image patches, 1 for text, int64.
    """
    num_experts = scores_TE.shape[1]
    probs_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    with torch.no_grad():
        cells_N = (modality_T.unsqueeze(1) * num_experts + expert_ids_TK).flatten()
        choices_ME = count_ids(cells_N, len(MODALITIES) * num_experts).view(-1, num_experts)
        entropy_T = torch.special.entr(probs_TE).sum(dim=-1)
        entropy_sum_M = entropy_T.new_zeros(len(MODALITIES)).index_add(0, modality_T, entropy_T)
    z_sum = torch.logsumexp(logits_TE, dim=-1).square().sum()
    return RouterStats(choices_ME, probs_TE.sum(dim=0), z_sum, entropy_sum_M)
