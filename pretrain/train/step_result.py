"""Result of a training step, and the limits with which it updates the weights."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from pretrain.moe.statistics import RouterStats


class StepResult(NamedTuple):
    """Losses and statistics of one step, over the global batch."""

    losses: dict[str, float]
    """`total`, each unweighted term, and each weighted term as `weighted/...`."""
    grad_norm: float
    """Global gradient norm before clipping; NaN without pairs."""
    is_updated: bool
    """Whether the weights were updated: not without pairs, nor if loss or norm are not finite or
    above their limits."""
    logit_scale: float
    pairs: int
    """Valid pairs of the global batch."""
    tokens_M: Tensor
    """Tokens by modality, float64 on CPU."""
    router: RouterStats
    """Router statistics, `[layers, ...]`, float64 on CPU."""
    biases: Tensor
    """Routing biases after the step, `[layers, M or 1, experts]` on CPU; empty without biases."""

    @property
    def tokens(self) -> int:
        """Valid tokens, patches and text."""
        return int(self.tokens_M.sum())

    @property
    def assignments_LME(self) -> Tensor:
        """Assignments by MoE layer, modality and expert."""
        return self.router.assignments_ME


class StepLimits(NamedTuple):
    """Largest values with which a step updates the weights."""

    loss: float = math.inf
    grad_norm: float = math.inf


NO_LIMITS = StepLimits()
