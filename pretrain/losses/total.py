"""The objective: every term on its own, before and after its weight.

Contrast and captioning are shares of one rank, which add up over ranks; the routers' terms come
from sums of the global batch (`pretrain.moe.auxiliary`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config.schema import LossConfig
from pretrain.moe.statistics import RouterStats


class GlobalSums(NamedTuple):
    """Sums over the global batch; constants for the gradient. float64."""

    pairs: Tensor
    """Valid pairs, scalar."""
    caption_tokens: Tensor
    """Predicted caption tokens, scalar."""
    tokens_M: Tensor
    """Tokens by modality."""
    router: RouterStats
    """What the routers did, `[layers, ...]`."""


class MainTerms(NamedTuple):
    """Shares of one rank, unweighted, float32 scalars with gradient."""

    contrastive: Tensor
    caption: Tensor

    def weighted_sum(self, loss: LossConfig) -> Tensor:
        """The share of the weighted terms."""
        weights = main_weights(loss)
        return torch.stack([weights[name] * term for name, term in self._asdict().items()]).sum()


def main_weights(loss: LossConfig) -> dict[str, float]:
    """The weight of each of `MainTerms`, by its name: for gradients and for what is told."""
    return {"contrastive": loss.contrastive_weight, "caption": loss.caption_weight}


def main_terms(*, contrastive: Tensor, caption_loss_sum: Tensor, sums: GlobalSums) -> MainTerms:
    """Divide one rank's sums by the global counts.

    Args:
        contrastive: This rank's share already.
        caption_loss_sum: Cross-entropy summed over this rank's caption tokens. It is divided by the
            *global* number of tokens: a mean of means would weight a token by how few its rank has.
        sums: Over the global batch.
    """
    return MainTerms(
        contrastive, caption_loss_sum / sums.caption_tokens.to(caption_loss_sum.dtype).clamp(min=1)
    )


def with_weights(values: dict[str, float], weights: dict[str, float]) -> dict[str, float]:
    """`total`, then each term before its weight by its name, then each after it as
    `weighted/...`."""
    weighted = {f"weighted/{name}": weights[name] * value for name, value in values.items()}
    return {"total": sum(weighted.values())} | values | weighted
