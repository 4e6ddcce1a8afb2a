"""Per-pair inputs of routing during training: sample indices, capacity groups and the step seed.

Shapes: B pairs, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config.experts import MoEConfig
from pretrain.moe.noise import hash_tokens
from pretrain.moe.token_metadata import TokenMetadata


class RoutingContext(NamedTuple):
    """What routing depends on in addition to the tokens.

    The defaults are for evaluation, where routing depends on the tokens only.
    """

    pair_ids_B: Tensor | None = None
    """Index of each sample in the data set, int64; required for training with random routing."""
    group_B: Tensor | None = None
    """Capacity group of each pair, int64, numbered from 0 within the micro-batch; required for
    training with a capacity limit."""
    num_groups: int = 0
    """Number of capacity groups in the micro-batch."""
    step_seed: int = 0
    """Seed of all random routing decisions of this step
    (`pretrain.moe.noise.derive_step_seed`)."""
    coactivation: bool = False
    """Also count how often each pair of experts is assigned to the same token."""


def add_routing_context(
    metadata: TokenMetadata, context: RoutingContext, moe: MoEConfig
) -> TokenMetadata:
    """Expand the per-pair context to tokens, as far as the routers of `moe` need it."""
    positions, context_length = metadata.text_positions, metadata.context_length
    num_patches = metadata.num_patches
    metadata = metadata._replace(step_seed=context.step_seed, coactivation=context.coactivation)

    if moe.is_random:
        assert context.pair_ids_B is not None
        token_hash_T = hash_tokens(context.pair_ids_B, num_patches, positions, context_length)
        metadata = metadata._replace(token_hash_T=token_hash_T)

    if moe.capacity_factor:
        assert context.group_B is not None
        pair_of_text_token = torch.div(positions, context_length, rounding_mode="floor")
        patch_groups = context.group_B.repeat_interleave(num_patches)
        text_groups = context.group_B.index_select(0, pair_of_text_token)
        group_T = torch.cat([patch_groups, text_groups])
        metadata = metadata._replace(group_T=group_T, num_groups=context.num_groups)
    return metadata
