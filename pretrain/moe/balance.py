"""Losses that keep a router healthy, from statistics of the global batch. Pure functions.

Every function returns one rank's *share*: the sum of the shares over all ranks and micro-batches is
the loss of the global batch, whatever the split. The counts and the number of tokens must therefore be
global; the probability sums are the caller's own, because gradient flows through those.

Shapes: E experts, L MoE layers.
"""

from __future__ import annotations

from torch import Tensor


def balance_share(prob_sum_LE: Tensor, global_choices_LE: Tensor, global_tokens: Tensor) -> Tensor:
    """Share of the Switch balance loss: summed over the ranks it is 1.0 when experts are evenly used.

    The loss is E x sum_e f_e P_e, with f_e the share of token choices of expert e and P_e its mean
    gate probability, averaged over the layers. It is 1.0 at perfect balance whatever k is, and E/k when
    all tokens pick the same k experts with certainty.

    Args:
        prob_sum_LE: This rank's sum over tokens of the gate probabilities, `[layers, experts]`.
        global_choices_LE: Token choices per expert in the global batch; a constant.
        global_tokens: Tokens of the global batch, scalar.

    Source: Fedus et al. 2021, arXiv:2101.03961, equations 4-6, for any top-k.
    """
    num_layers, num_experts = prob_sum_LE.shape
    choices_LE = global_choices_LE.to(prob_sum_LE.dtype)
    share_LE = choices_LE / choices_LE.sum(dim=-1, keepdim=True).clamp(min=1)
    mean_LE = prob_sum_LE / global_tokens.clamp(min=1)
    return num_experts * (share_LE * mean_LE).sum() / num_layers


def router_z_share(z_sum_L: Tensor, global_tokens: Tensor) -> Tensor:
    """Share of the router z-loss: mean over tokens and layers of logsumexp(logits) squared.

    Args:
        z_sum_L: This rank's sum over tokens of logsumexp(logits)^2, `[layers]`.
        global_tokens: Tokens of the global batch, scalar.

    Source: Zoph et al. 2022 (ST-MoE), arXiv:2202.08906, equation 5.
    """
    return z_sum_L.mean() / global_tokens.clamp(min=1)
