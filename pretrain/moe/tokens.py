"""What routers are told about the tokens of a forward pass, beside their states.

The flat list holds the patches of all pairs, then the valid text tokens of all pairs:
`num_patch_tokens` is the border between the two modalities.

Shapes: B pairs, P patches, S text positions, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MODALITIES = ("image", "text")


class RouterTokens(NamedTuple):
    """Where tokens come from; the same for every layer of a forward pass."""

    num_pairs: int
    """B"""
    num_patches: int
    """P; 0 when there are only captions."""
    context_length: int
    """S, the padded length; 0 when there are only images."""
    text_positions: Tensor
    """Flat indices b x S + s of the valid text tokens, int64."""
    identity_T: Tensor | None = None
    """A hash of (sample, modality, position) of every token, int64; None where nothing is
    random."""
    group_T: Tensor | None = None
    """Capacity group of every token, int64, counted from 0 in this micro-batch; None without
    capacity."""
    num_groups: int = 0
    """Capacity groups of this micro-batch."""
    draw: int = 0
    """Decides everything random of this step; from the run's seed and the step."""
    coactivation: bool = False
    """Also count which experts are chosen together."""

    @property
    def num_patch_tokens(self) -> int:
        """Tokens of the flat list that are patches; the text follows them."""
        return self.num_pairs * self.num_patches

    def pair_T(self) -> Tensor:
        """The pair of every token, int64."""
        pair_B = torch.arange(self.num_pairs, device=self.text_positions.device)
        text = torch.div(self.text_positions, max(1, self.context_length), rounding_mode="floor")
        return torch.cat([pair_B.repeat_interleave(self.num_patches), text])
