"""How many tokens an expert takes, and which ones it leaves.

The global batch is cut into groups of consecutive pairs, and in each group every expert has as many
places as a fair share of the group's choices, times a factor. Groups are made of pairs by their
number in the batch, so neither ranks nor micro-batches nor missing pairs change who competes with
whom. First choices of all tokens are placed before second ones.

Everything is sorting and counting on the device: the host never waits.

Shapes: T tokens, E experts, K experts per token, N = T x K choices, G groups, M modalities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.config.experts import MoEConfig
from pretrain.moe.noise import PRIORITY, hash_numbers
from pretrain.moe.routing import Routing, count_choices, count_ids
from pretrain.moe.tokens import RouterTokens


def limit(
    routing: Routing, gates_TE: Tensor, config: MoEConfig, tokens: RouterTokens, *, block: int
) -> Routing:
    """The routing in which every expert takes no more than its places.

    Args:
        routing: K choices of every token.
        gates_TE: Gate scores that chose and weigh, with their noise; a token's largest orders the
            tokens when `capacity_priority` is `batch`.
        config: `capacity_factor`, `capacity_priority`, `pools`.
        tokens: Knows the group of every token.
        block: The layer's block, a part of what a random order is drawn from.
    """
    assert tokens.group_T is not None and routing.k
    k, num_experts = routing.k, config.num_experts
    order_T = _priority(gates_TE, config, tokens, block).argsort(stable=True)
    ranks = torch.arange(k, device=order_T.device).unsqueeze(1)
    order_N = (
        order_T.unsqueeze(0) * k + ranks
    ).flatten()  # first choices of all tokens, then second ones
    cell_N = tokens.group_T.repeat_interleave(k) * num_experts + routing.expert_ids_N
    place_N = _place_in_cell(cell_N, order_N, tokens.num_groups * num_experts)
    places_GE = capacity(config, tokens)
    fits_N = place_N < places_GE.flatten().index_select(0, cell_N)
    ids_N = torch.where(fits_N, routing.expert_ids_N, num_experts)
    kept_ME = count_choices(ids_N, tokens.num_patch_tokens * k, num_experts)
    return routing._replace(
        weights_N=routing.weights_N * fits_N, expert_ids_N=ids_N, kept_ME=kept_ME
    )


def capacity(config: MoEConfig, tokens: RouterTokens) -> Tensor:
    """Places of every expert in every group: ceil(factor x k x tokens / experts), int64 `[groups,
    experts]`.

    With pools the tokens are those of the expert's modality and the experts those of its pool.
    """
    assert tokens.group_T is not None
    group_T, split = tokens.group_T, tokens.num_patch_tokens
    image_G, text_G = (
        count_ids(part, tokens.num_groups) for part in (group_T[:split], group_T[split:])
    )
    if config.pools == "shared":
        return _places(image_G + text_G, config, config.num_experts)
    sizes = [len(range(*config.pool(modality).indices(config.num_experts))) for modality in (0, 1)]
    return torch.cat([_places(image_G, config, sizes[0]), _places(text_G, config, sizes[1])], dim=1)


def _places(tokens_G: Tensor, config: MoEConfig, experts: int) -> Tensor:
    """Places of `experts` experts that share these tokens, `[groups, experts]`."""
    # In float64, and a hair less: 1.1 x 50 must be 55 places, but 1.1 is a little more in binary and the product
    # 55.00000000000001. In float32 even 1.2 x 25 would become 31.
    fair_G = config.capacity_factor * config.top_k * tokens_G.double() / experts
    return torch.ceil(fair_G - 1e-9).to(torch.int64).unsqueeze(1).expand(-1, experts)


def _priority(gates_TE: Tensor, config: MoEConfig, tokens: RouterTokens, block: int) -> Tensor:
    """A number for each token, smallest first."""
    if config.capacity_priority == "position":
        # Not the flat list's order, in which all patches of a group would come before its first
        # word.
        return tokens.pair_T()
    if config.capacity_priority == "batch":
        # Batch prioritized routing: the surest tokens first, by the gates that weigh them
        # (Riquelme et al. 2021, arXiv:2106.05974).
        return -gates_TE.detach().amax(dim=-1)
    assert tokens.identity_T is not None
    return hash_numbers(tokens.identity_T, draw=tokens.draw, block=block, purpose=PRIORITY).squeeze(
        1
    )


def _place_in_cell(cell_N: Tensor, order_N: Tensor, num_cells: int) -> Tensor:
    """How many choices of the same cell come before each choice in `order_N`, int64 `[choices]`."""
    sorted_N = order_N.index_select(0, cell_N.index_select(0, order_N).argsort(stable=True))
    counts = count_ids(cell_N, num_cells)
    starts = counts.cumsum(0) - counts
    numbers = torch.arange(len(cell_N), device=cell_N.device)
    place_N = torch.empty_like(numbers)
    place_N[sorted_N] = numbers - starts.index_select(0, cell_N.index_select(0, sorted_N))
    return place_N
