"""The training objective: every term separately, before and after weighting.

The contrastive and caption terms are local terms of one rank, which add up over ranks. The routers'
auxiliary terms are computed from sums of the global batch (`pretrain.moe.auxiliary`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config.schema import LossConfig
from pretrain.moe.statistics import RouterStats


class GlobalSums(NamedTuple):
    """Sums over the global batch, float64; constants for the gradient."""

    pairs: Tensor
    """Number of valid pairs, scalar."""
    caption_tokens: Tensor
    """Number of predicted caption tokens, scalar."""
    tokens_M: Tensor
    """Number of tokens of each modality."""
    router: RouterStats
    """Router statistics, `[layers, ...]`."""


class TaskLosses(NamedTuple):
    """Local terms of one rank, unweighted, float32 scalars with gradient."""

    contrastive: Tensor
    """InfoNCE."""
    caption: Tensor
    """Next-token cross-entropy (nats)."""

    def weighted_sum(self, loss: LossConfig) -> Tensor:
        """Weighted sum of the terms, a scalar with gradient."""
        weights = task_loss_weights(loss)
        return torch.stack([weights[name] * term for name, term in self._asdict().items()]).sum()


def task_loss_weights(loss: LossConfig) -> dict[str, float]:
    """Weight of each of the `TaskLosses` by name, for the gradients and for the logged losses."""
    return {"contrastive": loss.contrastive_weight, "caption": loss.caption_weight}


def task_losses(*, contrastive: Tensor, caption_loss_sum: Tensor, sums: GlobalSums) -> TaskLosses:
    """Normalize one rank's sums by the global counts.

    Args:
        contrastive: This rank's contrastive term, already normalized.
        caption_loss_sum: Cross-entropy summed over this rank's caption tokens. It is divided by the
            *global* number of tokens: in a mean of per-rank means, the weight of a token would
            depend on how many tokens its rank has.
        sums: Sums over the global batch.
    """
    num_tokens = sums.caption_tokens.to(caption_loss_sum.dtype).clamp(min=1)
    return TaskLosses(contrastive, caption_loss_sum / num_tokens)


def loss_metrics(values: dict[str, float], weights: dict[str, float]) -> dict[str, float]:
    """Metrics of the losses: `total` (the weighted sum), each unweighted term under its name, and
    each weighted term as `weighted/NAME`."""
    weighted = {f"weighted/{name}": weights[name] * value for name, value in values.items()}
    return {"total": sum(weighted.values())} | values | weighted
