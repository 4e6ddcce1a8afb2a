"""Metadata of the tokens of a forward pass that routers need in addition to the hidden states.

The flat token list holds the patches of all pairs, then the valid text tokens of all pairs:
`num_patch_tokens` is the boundary between the two modalities.

Shapes: B pairs, P patches, S text positions, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MODALITIES = ("image", "text")


class TokenMetadata(NamedTuple):
    """Sample, position and capacity group of each token; shared by all layers of a forward pass."""

    num_pairs: int
    """B"""
    num_patches: int
    """P; 0 for a batch without images."""
    context_length: int
    """S, the padded length; 0 for a batch without captions."""
    text_positions: Tensor
    """Flat indices b x S + s of the valid text tokens, int64."""
    token_hash_T: Tensor | None = None
    """Hash of (sample, modality, position) for every token, int64; None if routing is
    deterministic."""
    group_T: Tensor | None = None
    """Capacity group of every token, int64, numbered from 0 within the micro-batch; None without a
    capacity limit."""
    num_groups: int = 0
    """Number of capacity groups in the micro-batch."""
    step_seed: int = 0
    """Seed of all random routing decisions of this step; derived from the run's seed and the
    step (`pretrain.moe.noise.derive_step_seed`)."""
    coactivation: bool = False
    """Also count how often each pair of experts is assigned to the same token."""

    @property
    def num_patch_tokens(self) -> int:
        """Number of patch tokens in the flat list; text tokens follow them."""
        return self.num_pairs * self.num_patches

    def pair_T(self) -> Tensor:
        """Index of each token's pair in the micro-batch, int64."""
        pair_B = torch.arange(self.num_pairs, device=self.text_positions.device)
        text = torch.div(self.text_positions, max(1, self.context_length), rounding_mode="floor")
        return torch.cat([pair_B.repeat_interleave(self.num_patches), text])
