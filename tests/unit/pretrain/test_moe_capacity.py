"""Capacity limit: its size, and which assignments are kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.config.experts import MoEConfig
from pretrain.moe.capacity import apply_capacity, capacity
from pretrain.moe.layer import MoELayer
from pretrain.moe.routing import assign_experts, score_tokens
from tests.support.reference_moe import (
    ReferenceRouting,
    Token,
    make_tokens,
    reference_logits,
    reference_routing,
)

WIDTH = 16


@pytest.mark.parametrize("priority", ["position", "random", "batch"])
def test_capacity_and_priority(priority: str) -> None:
    torch.manual_seed(3)
    config = MoEConfig(
        num_experts=4,
        top_k=2,
        capacity_factor=0.5,
        capacity_priority=priority,  # type: ignore[arg-type]
    )
    layer = MoELayer(WIDTH, config)
    torch.nn.init.normal_(layer.gate.weight)
    tokens, token_list = make_tokens([4] * 6, 6, groups=[0, 0, 0, 1, 1, 1], step_seed=5)
    logits_TE = layer.gate(torch.randn(len(token_list), WIDTH))
    scored = score_tokens(logits_TE, config, tokens, block_index=0, noise=True)
    unlimited = assign_experts(scored, config, tokens, None, block_index=0, noise=True)
    limited = apply_capacity(unlimited, scored.gates_TE, config, tokens, block_index=0)

    assert capacity(config, tokens).tolist() == [[8] * 4] * 2  # 0.5 x 2 x 30 / 4 = 7.5
    ids_TK = unlimited.expert_ids_N.view(-1, 2)
    kept_TK = (limited.expert_ids_N < 4).view(-1, 2)
    kept_N = kept_TK.flatten()
    assert torch.equal(limited.expert_ids_N[kept_N], unlimited.expert_ids_N[kept_N])
    assert (limited.weights_N.view(-1, 2)[~kept_TK] == 0).all() and (~kept_TK).any()

    max_score_T = scored.scores_TE.amax(1)
    for group in (0, 1):
        in_group_T = torch.tensor([token.group == group for token in token_list])
        for expert in range(4):
            assigned_TK = (ids_TK == expert) & in_group_T.unsqueeze(1)
            # Every slot is used if there are enough assignments.
            assert int((kept_TK & assigned_TK).sum()) == min(8, int(assigned_TK.sum()))
            check_order(priority, kept_TK, assigned_TK, max_score_T, token_list)


def check_order(
    priority: str,
    kept_TK: Tensor,
    assigned_TK: Tensor,
    max_score_T: Tensor,
    token_list: list[Token],
) -> None:
    """The assignments kept by one expert in one group come first in the priority order."""
    first_dropped = not kept_TK[:, 0][assigned_TK[:, 0]].all()
    if first_dropped:
        assert not kept_TK[:, 1][assigned_TK[:, 1]].any()

    for k in (0, 1):
        kept_T, assigned_T = kept_TK[:, k], assigned_TK[:, k]
        if priority == "batch" and kept_T[assigned_T].any():
            dropped_scores = max_score_T[assigned_T & ~kept_T]
            assert (dropped_scores <= max_score_T[assigned_T & kept_T].min()).all()
        if priority == "position":
            in_order = sorted(
                assigned_T.nonzero().flatten().tolist(),
                key=lambda i: (token_list[i].pair, token_list[i].modality, token_list[i].position),
            )
            is_kept = kept_T[in_order].int()
            assert torch.equal(is_kept, is_kept.sort(descending=True).values)


@pytest.mark.parametrize(
    ("factor", "k", "experts", "count", "expected"),
    [
        (1.1, 1, 1, 50, 55),  # 55.00000000000001 in float64
        (1.1, 2, 4, 100, 55),
        (1.2, 1, 1, 25, 30),  # 30.000002 in float32, exact in float64
        (1.05, 3, 4, 80, 63),  # 63.00000000000001 in float64
        (1.25, 2, 8, 8, 3),  # 2.5 is rounded up
        (0.5, 1, 4, 9, 2),  # 1.125 is rounded up
    ],
)
def test_capacity_equals_exact_arithmetic(
    factor: float, k: int, experts: int, count: int, expected: int
) -> None:
    config = MoEConfig(num_experts=experts, top_k=k, capacity_factor=factor)
    tokens, _ = make_tokens([count], 0, columns=count)
    assert capacity(config, tokens).tolist() == [[expected] * experts]


def test_batch_priority_uses_noisy_gates() -> None:
    """With noisy routing, batch priority orders tokens by their noisy gates: no assignment is
    dropped in favor of one whose token has a smaller largest gate."""
    torch.manual_seed(4)
    config = MoEConfig(
        num_experts=4,
        top_k=2,
        routing="noisy_top_k",
        noise_std=8.0,
        capacity_factor=0.5,
        capacity_priority="batch",
        norm_topk_prob=False,
    )
    layer = MoELayer(WIDTH, config, block_index=2)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens, token_list = make_tokens([4] * 6, 6, groups=[0, 0, 0, 1, 1, 1], step_seed=5)
    x_TD = torch.randn(len(token_list), WIDTH)
    _, _, routing = layer.route(x_TD, tokens)
    reference = reference_routing(layer, reference_logits(layer, x_TD, token_list), token_list, 5)
    kept = (routing.expert_ids_N < 4).view(-1, 2).tolist()
    noisy = [float(row.detach().max()) for row in reference.gates]
    clean = [float(row.detach().max()) for row in reference.scores]

    assert count_inversions(noisy, kept, reference, token_list) == 0
    # Noise of this size changes the order, so the assertion above does distinguish the two.
    assert count_inversions(clean, kept, reference, token_list) > 5
    # The weight of a first assignment is the token's largest gate.
    first_weights = [float(token[0][1].detach()) for token in reference.assignments]
    assert first_weights == noisy


def count_inversions(
    priority: list[float],
    kept: list[list[bool]],
    reference: ReferenceRouting,
    token_list: list[Token],
) -> int:
    """Dropped assignments with a higher priority than a kept one of the same expert, group and
    rank."""
    inversions = 0
    for rank in (0, 1):
        kept_priorities: dict[tuple[int, int], list[float]] = {}
        dropped: list[tuple[tuple[int, int], float]] = []
        for i, token in enumerate(token_list):
            cell = (reference.assignments[i][rank][0], token.group)
            if kept[i][rank]:
                kept_priorities.setdefault(cell, []).append(priority[i])
            else:
                dropped.append((cell, priority[i]))
        for cell, value in dropped:
            inversions += any(value > other for other in kept_priorities.get(cell, []))
    return inversions
