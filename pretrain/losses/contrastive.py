"""InfoNCE over the global batch, as the local term of one rank. A pure function.

Shapes: B pairs of this rank, G rows of the gathered batch (all ranks, padding rows included), D
embedding width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class GatheredPairs(NamedTuple):
    """Embeddings and caption hashes of all ranks, in rank order.

    Every rank contributes the same number of rows; a rank with skipped samples pads its part.
    """

    image_GD: Tensor
    """Image embeddings; the gradient must flow back to the ranks that computed them."""
    text_GD: Tensor
    """Text embeddings, likewise."""
    hashes_G: Tensor
    """Hash of each caption, int64."""
    valid_G: Tensor
    """True for pairs, False for padding rows."""
    first_row: int
    """Row of this rank's first pair."""


def local_info_nce(
    image_BD: Tensor,
    text_BD: Tensor,
    *,
    hashes_B: Tensor,
    gathered: GatheredPairs,
    logit_scale: Tensor,
    num_pairs: Tensor,
    mask_equal_captions: bool,
) -> Tensor:
    """The part of the symmetric InfoNCE loss that belongs to this rank's pairs.

    The sum over all ranks is the loss of the full matrix: half the mean over pairs of the
    cross-entropies image -> text and text -> image. Random embeddings give `log(num_pairs)`.

    Args:
        image_BD: This rank's image embeddings, unit vectors, float32.
        text_BD: This rank's text embeddings, unit vectors, float32.
        hashes_B: Hash of each caption of this rank, int64.
        gathered: The pairs of all ranks, this one included.
        logit_scale: Inverse temperature, float32 scalar.
        num_pairs: Number of pairs in the global batch, scalar.
        mask_equal_captions: Do not use pairs with the same caption as negatives.

    Returns:
        Scalar with gradient.

    Source: van den Oord et al. 2018, arXiv:1807.03748; Radford et al. 2021 (CLIP),
    arXiv:2103.00020.
    """
    num_local, device = image_BD.shape[0], image_BD.device
    targets_B = torch.arange(num_local, device=device) + gathered.first_row
    masked_BG = ~gathered.valid_G.unsqueeze(0).expand(num_local, -1)
    if mask_equal_captions:
        masked_BG = masked_BG | (hashes_B.unsqueeze(1) == gathered.hashes_G.unsqueeze(0))
    columns_G = torch.arange(gathered.valid_G.shape[0], device=device)
    masked_BG = masked_BG & (columns_G.unsqueeze(0) != targets_B.unsqueeze(1))

    def cross_entropy_sum(queries_BD: Tensor, keys_GD: Tensor) -> Tensor:
        logits_BG = logit_scale * queries_BD @ keys_GD.T
        logits_BG = logits_BG.masked_fill(masked_BG, float("-inf"))
        return F.cross_entropy(logits_BG, targets_B, reduction="sum")

    image_to_text = cross_entropy_sum(image_BD, gathered.text_GD)
    text_to_image = cross_entropy_sum(text_BD, gathered.image_GD)
    return (image_to_text + text_to_image) / (2 * num_pairs.clamp(min=1))
