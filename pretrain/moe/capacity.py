"""Capacity limit: how many tokens an expert may process, and which assignments are dropped.

The global batch is divided into groups of consecutive pairs. In each group, the capacity of every
expert is its mean number of assignments times `capacity_factor`. Groups depend only on the position
of a pair in the global batch, so the dropped assignments do not depend on ranks, micro-batches or
missing pairs. The top-1 assignments of all tokens take precedence over the second ones.

The implementation uses only sorting and counting on the device and never synchronizes with the
host.

Shapes: T tokens, E experts, K experts per token, N = T x K assignments, G groups, M modalities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.config.experts import MoEConfig
from pretrain.moe.noise import PRIORITY, random_int64
from pretrain.moe.routing import Routing, count_assignments, count_ids
from pretrain.moe.tokens import TokenBatch


def apply_capacity(
    routing: Routing,
    gates_TE: Tensor,
    config: MoEConfig,
    tokens: TokenBatch,
    *,
    block_index: int,
) -> Routing:
    """Drop the assignments that exceed the capacity of their expert.

    Args:
        routing: K assignments for every token.
        gates_TE: Gate scores that gave the selection and the weights, noise included; a token's
            largest score is its priority if `capacity_priority` is `batch`.
        config: Uses `capacity_factor`, `capacity_priority`, `pools`, `top_k` and `num_experts`.
        tokens: Metadata of the tokens, with capacity groups.
        block_index: Index of the layer's block; part of the seed of a random order.
    """
    assert tokens.group_T is not None and routing.k
    k, num_experts = routing.k, config.num_experts

    # Order: the top-1 assignments of all tokens by priority, then the second ones, and so on.
    order_T = _priority(gates_TE, config, tokens, block_index).argsort(stable=True)
    assignment_ranks = torch.arange(k, device=order_T.device).unsqueeze(1)
    order_N = (order_T.unsqueeze(0) * k + assignment_ranks).flatten()

    # A cell is one expert in one capacity group.
    cell_N = tokens.group_T.repeat_interleave(k) * num_experts + routing.expert_ids_N
    slot_N = _slot_in_cell(cell_N, order_N, tokens.num_groups * num_experts)
    capacity_GE = capacity(config, tokens)
    kept_N = slot_N < capacity_GE.flatten().index_select(0, cell_N)

    ids_N = torch.where(kept_N, routing.expert_ids_N, num_experts)
    kept_ME = count_assignments(ids_N, tokens.num_patch_tokens * k, num_experts)
    return routing._replace(
        weights_N=routing.weights_N * kept_N, expert_ids_N=ids_N, kept_ME=kept_ME
    )


def capacity(config: MoEConfig, tokens: TokenBatch) -> Tensor:
    """Capacity of every expert in every group: ceil(factor x k x tokens / experts), int64 `[groups,
    experts]`.

    With expert pools, the tokens are those of the pool's modality and the experts those of the
    pool.
    """
    assert tokens.group_T is not None
    split = tokens.num_patch_tokens
    image_tokens_G = count_ids(tokens.group_T[:split], tokens.num_groups)
    text_tokens_G = count_ids(tokens.group_T[split:], tokens.num_groups)

    if config.pools == "shared":
        return _pool_capacity(image_tokens_G + text_tokens_G, config, config.num_experts)
    pool_sizes = [
        len(range(*config.pool(modality).indices(config.num_experts))) for modality in (0, 1)
    ]
    image_capacity_GE = _pool_capacity(image_tokens_G, config, pool_sizes[0])
    text_capacity_GE = _pool_capacity(text_tokens_G, config, pool_sizes[1])
    return torch.cat([image_capacity_GE, text_capacity_GE], dim=1)


def _pool_capacity(tokens_G: Tensor, config: MoEConfig, num_experts: int) -> Tensor:
    """Capacity of `num_experts` experts that process these tokens, int64 `[groups, experts]`."""
    # Float64 with a small tolerance: 1.1 x 50 must give 55, but in binary the product is
    # 55.00000000000001. In float32 even 1.2 x 25 would give 31.
    exact_G = config.capacity_factor * config.top_k * tokens_G.double() / num_experts
    return torch.ceil(exact_G - 1e-9).to(torch.int64).unsqueeze(1).expand(-1, num_experts)


def _priority(gates_TE: Tensor, config: MoEConfig, tokens: TokenBatch, block_index: int) -> Tensor:
    """Priority of each token; the smallest value comes first."""
    if config.capacity_priority == "position":
        # By pair. In the order of the flat list, all patches of a group would come before its text.
        return tokens.pair_T()
    if config.capacity_priority == "batch":
        # Batch prioritized routing: the largest gate scores first (Riquelme et al. 2021,
        # arXiv:2106.05974).
        return -gates_TE.detach().amax(dim=-1)
    assert tokens.token_hash_T is not None
    random_T1 = random_int64(
        tokens.token_hash_T, step_seed=tokens.step_seed, block_index=block_index, purpose=PRIORITY
    )
    return random_T1.squeeze(1)


def _slot_in_cell(cell_N: Tensor, order_N: Tensor, num_cells: int) -> Tensor:
    """Number of assignments of the same cell that precede each one in `order_N`, int64
    `[assignments]`."""
    sorted_N = order_N.index_select(0, cell_N.index_select(0, order_N).argsort(stable=True))
    counts = count_ids(cell_N, num_cells)
    cell_starts = counts.cumsum(0) - counts

    positions_N = torch.arange(len(cell_N), device=cell_N.device)
    slot_N = torch.empty_like(positions_N)
    slot_N[sorted_N] = positions_N - cell_starts.index_select(0, cell_N.index_select(0, sorted_N))
    return slot_N
