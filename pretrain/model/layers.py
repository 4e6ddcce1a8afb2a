"""Basic layers: linear maps, RMSNorm, token embedding, rotary positions.

Weights are cast to the dtype of the activations where they are used. A model with float32
parameters therefore computes in bfloat16 if its activations are bfloat16, and with bfloat16
parameters the cast is free.

Shapes: T tokens, H heads, Q head width, R = Q / 2 rotary frequencies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """A linear map without bias, weight `[out, in]`."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in))

    def forward(self, x: Tensor) -> Tensor:
        """Map the last dimension from `in` to `out`."""
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) x weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension; the dtype does not change."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class TextEmbedding(nn.Module):
    """Token embedding, also used as the tied LM head.

    Both uses go through `forward`, so that a partitioned weight (ZeRO-3) is gathered for each.
    """

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, ids: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """Return embeddings `[..., width]` of `ids`, or logits `[..., vocab]` of `hidden`."""
        if hidden is not None:
            return F.linear(hidden, self.weight.to(hidden.dtype))
        assert ids is not None
        return F.embedding(ids, self.weight)


def rotary_angles_1d(num_positions: int, head_width: int, theta: float) -> Tensor:
    """Angles of one-dimensional rotary positions, float32 `[positions, head_width / 2]`.

    Source: Su et al. 2021 (RoFormer), arXiv:2104.09864.
    """
    frequencies = theta ** -(torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    return torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)


def rotary_angles_2d(side: int, head_width: int, theta: float) -> Tensor:
    """Angles of two-dimensional rotary positions, float32 `[side^2, head_width / 2]`.

    The first half of the frequencies encodes the row, the second half the column.
    """
    angles_1d = rotary_angles_1d(side, head_width // 2, theta)
    rows = angles_1d.repeat_interleave(side, dim=0)
    columns = angles_1d.repeat(side, 1)
    return torch.cat([rows, columns], dim=1)


def apply_rotary(x_THQ: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    """Rotate the channel pairs (i, i + Q/2) of each head by the angles of the position.

    Args:
        x_THQ: Queries or keys, `[tokens, heads, head_width]`.
        cos_T1R: Cosines `[tokens, 1, head_width / 2]`, same dtype as `x_THQ`.
        sin_T1R: Sines, same shape and dtype.
    """
    first, second = x_THQ.chunk(2, dim=-1)
    return torch.cat(
        [first * cos_T1R - second * sin_T1R, second * cos_T1R + first * sin_T1R], dim=-1
    )
