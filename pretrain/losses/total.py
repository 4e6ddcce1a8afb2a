"""The objective: every term on its own, before and after its weight.

Each term is one rank's share of the loss of the global batch; see `pretrain.moe.balance`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pretrain.config.schema import LossConfig
from pretrain.moe.balance import balance_share, router_z_share


class GlobalCounts(NamedTuple):
    """Sums over the global batch that the shares are divided by; constants for the gradient."""

    pairs: Tensor
    """Valid pairs, float64 scalar."""
    caption_tokens: Tensor
    """Predicted caption tokens, float64 scalar."""
    tokens_M: Tensor
    """Tokens by modality, float64."""
    choices_LME: Tensor
    """Token choices by MoE layer, modality and expert, float64."""


class LossTerms(NamedTuple):
    """Shares of one rank, unweighted, float32 scalars with gradient."""

    contrastive: Tensor
    caption: Tensor
    balance: Tensor
    router_z: Tensor

    def weighted_sum(self, weights: LossConfig) -> Tensor:
        """The share of the total loss."""
        return (
            weights.contrastive_weight * self.contrastive
            + weights.caption_weight * self.caption
            + weights.balance_weight * self.balance
            + weights.router_z_weight * self.router_z
        )


def loss_terms(
    *,
    contrastive: Tensor,
    caption_loss_sum: Tensor,
    prob_sum_LE: Tensor,
    z_sum_L: Tensor,
    counts: GlobalCounts,
) -> LossTerms:
    """Divide one rank's sums by the global counts.

    Args:
        contrastive: This rank's share already.
        caption_loss_sum: Cross-entropy summed over this rank's caption tokens. It is divided by the
            *global* number of tokens: a mean of means would weight a token by how few its rank has.
        prob_sum_LE: Gate probabilities summed over this rank's tokens.
        z_sum_L: Squared logsumexp summed over this rank's tokens.
        counts: Sums over the global batch.
    """
    dtype = caption_loss_sum.dtype
    tokens = counts.tokens_M.sum().to(dtype)
    caption = caption_loss_sum / counts.caption_tokens.to(dtype).clamp(min=1)
    if not len(prob_sum_LE):  # a dense trunk
        return LossTerms(contrastive, caption, caption.new_zeros(()), caption.new_zeros(()))
    balance = balance_share(prob_sum_LE, counts.choices_LME.sum(dim=1).to(dtype), tokens)
    return LossTerms(contrastive, caption, balance, router_z_share(z_sum_L, tokens))
