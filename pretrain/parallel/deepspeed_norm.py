"""The gradient norm with ZeRO 1 to 3, and a limit above which DeepSpeed skips a step.

DeepSpeed 0.19.8 computes the norm inside of its optimizer step and skips the step if the norm is
not finite: weights, moments and step counts stay. The same path is used for norms above the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.utils import combine_grad_norm_groups


class GradientNorm:
    """Observes and limits the norm that an optimizer computes."""

    def __init__(self, optimizer: Any, zero_stage: int) -> None:
        """Replace the optimizer's function that computes the norm; does nothing at stage 0."""
        self.value, self._limit = math.nan, math.inf
        """Norm of the last step before clipping; infinite if it is not finite."""
        if zero_stage in (1, 2):
            compute = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = lambda *args, **kwargs: self._limited(
                compute(*args, **kwargs)
            )
        elif zero_stage == 3:
            optimizer._get_norm_groups = self._limited_groups(optimizer._get_norm_groups)

    def start(self, limit: float) -> None:
        """Set the limit of the next step. If a gradient is not finite, no norm is computed."""
        self.value, self._limit = math.inf, limit

    def _limited(self, norm: Any) -> Any:
        """The norm, or NaN if the step must be skipped."""
        self.value = float(norm)
        if self.value < 0:  # DeepSpeed's sign for a norm that is not finite
            self.value = math.inf
        return norm if self.value <= self._limit else torch.full_like(norm, math.nan)

    def _limited_groups(self, compute: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
        def limited() -> list[Any]:
            groups = compute()
            norm = self._limited(combine_grad_norm_groups(groups))
            return groups if math.isfinite(float(norm)) else [norm]

        return limited
