"""Which experts each token visits, and with what weight. Pure functions of the router's logits.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """The choice made for every token."""

    weights_TK: Tensor
    """Gate weights of the chosen experts, float32; gradient flows through these."""
    expert_ids_TK: Tensor
    """Chosen experts by global number, int64."""
    tokens_per_expert_E: Tensor
    """Token choices that each expert got, int64."""


def gate_scores(logits_TE: Tensor, score: Literal["softmax", "sigmoid"], temperature: float) -> Tensor:
    """Turn router logits into gate scores in (0, 1).

    Args:
        logits_TE: Router logits, float32, `[tokens, experts]`.
        score: `softmax` competes between experts; `sigmoid` judges each alone.
        temperature: Multiplies the logits first (`a` in softmax(a x logits)).
    """
    if score == "softmax":
        return torch.softmax(logits_TE * temperature, dim=-1)
    return torch.sigmoid(logits_TE * temperature)


def topk_route(scores_TE: Tensor, k: int, *, renormalise: bool) -> Routing:
    """Send each token to its `k` best experts.

    Args:
        scores_TE: Gate scores, float32, `[tokens, experts]`.
        k: Experts per token, `1..experts`.
        renormalise: Let the chosen weights of a token sum to one. With `k = 1` that would make every
            weight the constant 1 and leave the router without a gradient, so a single choice keeps its
            raw score (Fedus et al. 2021, arXiv:2101.03961).
    """
    weights_TK, expert_ids_TK = scores_TE.topk(k, dim=-1)
    if renormalise and k > 1:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    counts_E = count_ids(expert_ids_TK.flatten(), scores_TE.shape[-1])
    return Routing(weights_TK, expert_ids_TK, counts_E)


def count_ids(ids_N: Tensor, size: int) -> Tensor:
    """How often each of `0..size-1` occurs, int64 `[size]`.

    On a GPU `bincount` would stop the host to learn the largest id; adding ones does not, and integers
    add up to the same sum in any order.
    """
    if ids_N.is_cuda:
        return torch.zeros(size, dtype=torch.int64, device=ids_N.device).index_add_(0, ids_N, torch.ones_like(ids_N))
    return torch.bincount(ids_N, minlength=size)
