"""InfoNCE over the global batch, as one rank's share. Pure.

Shapes: B this rank's pairs, G rows of the gathered batch (all ranks, some of them empty), D
embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce_share(
    image_BD: Tensor,
    text_BD: Tensor,
    all_image_GD: Tensor,
    all_text_GD: Tensor,
    *,
    hashes_B: Tensor,
    all_hashes_G: Tensor,
    valid_G: Tensor,
    first_row: int,
    logit_scale: Tensor,
    num_pairs: Tensor,
    mask_equal_captions: bool,
) -> Tensor:
    """Share of the symmetric InfoNCE loss that belongs to this rank's pairs.

    The sum of the shares over all ranks is the loss of the full matrix: the mean over the pairs of
    the cross-entropies image -> text and text -> image, halved. `log(num_pairs)` is chance.

    Args:
        image_BD: This rank's image embeddings, unit vectors, float32.
        text_BD: This rank's text embeddings.
        all_image_GD: Image embeddings of all ranks; gradient must flow back to their owners.
        all_text_GD: Text embeddings of all ranks.
        hashes_B: Hash of each caption of this rank, int64.
        all_hashes_G: Hashes of all ranks.
        valid_G: Which gathered rows are pairs (ranks with bad samples fill up with empty rows).
        first_row: Where this rank's pairs begin in the gathered rows.
        logit_scale: Scalar, float32.
        num_pairs: Pairs of the global batch, scalar.
        mask_equal_captions: Do not use a pair with the same caption as a negative.

    Source: van den Oord et al. 2018, arXiv:1807.03748; Radford et al. 2021 (CLIP),
    arXiv:2103.00020.
    """
    targets_B = torch.arange(image_BD.shape[0], device=image_BD.device) + first_row
    excluded_BG = ~valid_G.unsqueeze(0).expand(image_BD.shape[0], -1)
    if mask_equal_captions:
        excluded_BG = excluded_BG | (hashes_B.unsqueeze(1) == all_hashes_G.unsqueeze(0))
    columns_G = torch.arange(valid_G.shape[0], device=valid_G.device)
    excluded_BG = excluded_BG & (columns_G.unsqueeze(0) != targets_B.unsqueeze(1))

    def direction(queries_BD: Tensor, answers_GD: Tensor) -> Tensor:
        logits_BG = (logit_scale * queries_BD @ answers_GD.T).masked_fill(
            excluded_BG, float("-inf")
        )
        return F.cross_entropy(logits_BG, targets_B, reduction="sum")

    both = direction(image_BD, all_text_GD) + direction(text_BD, all_image_GD)
    return both / (2 * num_pairs.clamp(min=1))
