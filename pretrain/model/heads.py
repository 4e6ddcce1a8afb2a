"""Embedding heads: attention pooling for images, the end-of-text token for captions.

Shapes: B pairs, P patches, D trunk width, H pooling heads, Q pooling head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.layers import Linear, RMSNorm


class ImageHead(nn.Module):
    """Attention pooling with one learned query per head, then projection and normalization."""

    def __init__(self, width: int, num_heads: int, embed_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = RMSNorm(width)
        self.query = nn.Parameter(torch.empty(width))
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.out = Linear(width, embed_dim)

    def forward(self, patches_BPD: Tensor) -> Tensor:
        """Return unit vectors, float32 `[pairs, embed_dim]`."""
        pairs, patches, width = patches_BPD.shape
        x = self.norm(patches_BPD)
        heads = (pairs, patches, self.num_heads, width // self.num_heads)
        keys = self.key(x).view(heads).transpose(1, 2)
        values = self.value(x).view(heads).transpose(1, 2)
        query = self.query.to(x.dtype).view(1, self.num_heads, 1, -1).expand(pairs, -1, -1, -1)
        pooled_BD = F.scaled_dot_product_attention(query, keys, values).reshape(pairs, width)
        return F.normalize(self.out(pooled_BD).float(), dim=-1)


class TextHead(nn.Module):
    """Projection and normalization of the hidden state at the end-of-text token."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.out = Linear(width, embed_dim)

    def forward(self, ends_BD: Tensor) -> Tensor:
        """Return unit vectors, float32 `[pairs, embed_dim]`."""
        return F.normalize(self.out(self.norm(ends_BD)).float(), dim=-1)
