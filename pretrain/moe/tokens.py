"""The tokens of a batch: one value for attention, routers and statistics.

The flat token list holds the patches of all pairs, then the valid text tokens of all pairs:
`num_patch_tokens` is the boundary between the two modalities.

Shapes: B pairs, P patches, S text positions, T tokens, R rotary frequencies.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.moe.noise import hash_tokens

MODALITIES = ("image", "text")


class TokenBatch(NamedTuple):
    """Describes the tokens of a micro-batch; shared by all layers of a forward pass."""

    num_pairs: int
    """B"""
    num_patches: int
    """P; 0 for a batch without images."""
    context_length: int
    """S, the padded length; 0 for a batch without captions."""
    text_positions: Tensor
    """Flat indices b x S + s of the valid text tokens, int64."""
    token_hash_T: Tensor | None = None
    """Hash of (sample, modality, position) for every token, int64; needed for training with random
    routing."""
    group_T: Tensor | None = None
    """Capacity group of every token, int64, numbered from 0 within the micro-batch; needed for
    training with a capacity limit."""
    num_groups: int = 0
    """Number of capacity groups in the micro-batch."""
    step_seed: int = 0
    """Seed of all random routing decisions of this step; derived from the run's seed and the
    step (`pretrain.moe.noise.derive_step_seed`)."""
    coactivation: bool = False
    """Also count how often each pair of experts is assigned to the same token."""
    cos_T1R: Tensor | None = None
    """Rotary cosines of every token, `[tokens, 1, R]`; the model adds them."""
    sin_T1R: Tensor | None = None
    """Rotary sines, like the cosines."""

    @property
    def num_patch_tokens(self) -> int:
        """Number of patch tokens in the flat list; text tokens follow them."""
        return self.num_pairs * self.num_patches

    def pair_T(self) -> Tensor:
        """Index of each token's pair in the micro-batch, int64."""
        return self._expand(torch.arange(self.num_pairs, device=self.text_positions.device))

    def with_sample_ids(self, ids_B: Tensor) -> TokenBatch:
        """Add what random routing needs.

        Args:
            ids_B: Index of each pair's sample in the data set, int64.
        """
        token_hash_T = hash_tokens(
            ids_B, self.num_patches, self.text_positions, self.context_length
        )
        return self._replace(token_hash_T=token_hash_T)

    def with_capacity_groups(self, group_B: Tensor, num_groups: int) -> TokenBatch:
        """Add what a capacity limit needs.

        Args:
            group_B: Capacity group of each pair, int64, numbered from 0 within the micro-batch.
            num_groups: Number of capacity groups in the micro-batch.
        """
        return self._replace(group_T=self._expand(group_B), num_groups=num_groups)

    def _expand(self, values_B: Tensor) -> Tensor:
        """A value of each pair, for every token of the flat list."""
        pair_of_text = torch.div(
            self.text_positions, max(1, self.context_length), rounding_mode="floor"
        )
        patches = values_B.repeat_interleave(self.num_patches)
        return torch.cat([patches, values_B.index_select(0, pair_of_text)])
