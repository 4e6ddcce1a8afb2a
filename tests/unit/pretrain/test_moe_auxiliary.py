"""The routers' auxiliary losses: values against their definitions, gradients against autograd on
the whole batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config.experts import BalanceConfig, MoEConfig, PerModality
from pretrain.moe.auxiliary import (
    balance_loss,
    global_entropy_loss,
    linearize,
    target_num_experts,
)
from pretrain.moe.routing import assign_experts, score_tokens
from pretrain.moe.statistics import RouterStats, router_stats, stack_stats
from pretrain.moe.tokens import TokenBatch
from tests.support.reference_auxiliary import reference_terms
from tests.support.reference_moe import make_tokens

ALL_TERMS = BalanceConfig(
    balance_weight=0.3,
    router_z_weight=0.2,
    importance_weight=0.7,
    load_weight=0.9,
    local_entropy_weight=PerModality(image=0.11, text=0.5),
    global_entropy_weight=PerModality(image=1.3, text=0.6),
    global_entropy_experts=PerModality(image=5.5, text=3.0),
    expert_l1_weight=0.01,
    router_l1_weight=0.02,
)
LAYERS, EXPERTS, PATCHES = 2, 8, 3
LENGTHS, IDS = [4, 2, 5, 1, 3, 2], [3, 1, 4, 15, 9, 26]


def compute_stats(
    logits_LTE: Tensor,
    tokens: TokenBatch,
    config: MoEConfig,
    l1: tuple[Tensor, Tensor] | None = None,
) -> RouterStats:
    """Statistics of all layers, with noise; `l1` holds the L1 norms of experts and routers."""
    layers = []
    for block_index, logits in enumerate(logits_LTE):
        scored = score_tokens(logits, config, tokens, block_index=block_index, noise=True)
        routing = assign_experts(scored, config, tokens, None, block_index=block_index, noise=True)
        stats = router_stats(
            logits,
            scored,
            routing,
            tokens,
            config,
            load=True,
            expert_l1=l1[0][block_index] if l1 else None,
            router_l1=l1[1][block_index] if l1 else None,
        )
        layers.append(stats)
    return stack_stats(layers, EXPERTS, logits_LTE.device)


def detached_double(stats: RouterStats) -> RouterStats:
    return RouterStats(*(field.detach().double() for field in stats))


def rank_statistics(
    split: list[int], logits_LTE: Tensor, config: MoEConfig, experts: Tensor, routers: Tensor
) -> list[RouterStats]:
    """Statistics of each rank, with `split` pairs per rank; with several ranks, the expert weights
    are split over two of them, in half as many replicas as ranks."""
    _, token_list = make_tokens(LENGTHS, PATCHES)
    local_stats, start = [], 0
    for rank, num_pairs in enumerate(split):
        pairs = range(start, start + num_pairs)
        local_tokens, _ = make_tokens(
            [LENGTHS[b] for b in pairs], PATCHES, ids=[IDS[b] for b in pairs], step_seed=8
        )
        rows = [i for i, token in enumerate(token_list) if token.pair in pairs]
        local_experts = experts if len(split) == 1 else experts.chunk(2, dim=1)[rank % 2]
        l1 = (local_experts.abs().sum(1), routers.abs().sum(1))
        local_stats.append(compute_stats(logits_LTE[:, rows], local_tokens, config, l1))
        start += num_pairs
    return local_stats


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"score_func": "sigmoid", "temperature": 1.5},
        {"pools": "modality", "image_experts": 5, "top_k": 3},
        {"pools": "modality", "score_func": "sigmoid", "image_experts": 5, "temperature": 1.5},
    ],
    ids=["softmax", "sigmoid", "pools", "pools-sigmoid"],
)
@pytest.mark.parametrize("split", [[6], [3, 3], [1, 0, 4, 1]], ids=str)
def test_values_and_gradients_for_any_split(settings: dict[str, Any], split: list[int]) -> None:
    torch.manual_seed(0)
    config = MoEConfig(
        **({"num_experts": EXPERTS, "top_k": 2, "routing": "noisy_top_k"} | settings)
    )
    tokens, token_list = make_tokens(LENGTHS, PATCHES, ids=IDS, step_seed=8)
    logits = (
        2 * torch.randn(LAYERS, len(token_list), EXPERTS, dtype=torch.float64)
    ).requires_grad_()
    tokens_M = torch.tensor([PATCHES * 6.0, sum(LENGTHS)], dtype=torch.float64)
    experts = torch.rand(LAYERS, 5, dtype=torch.float64).requires_grad_()
    routers = torch.rand(LAYERS, 5, dtype=torch.float64).requires_grad_()
    inputs = [logits, experts, routers]

    # Reference: the whole batch at once, each term from its definition.
    whole = compute_stats(logits, tokens, config)
    expected = reference_terms(logits, tokens.num_patch_tokens, config, ALL_TERMS, whole)
    expected |= {"expert_l1": experts.abs().sum(), "router_l1": routers.abs().sum()}
    weights = linearize(detached_double(whole), tokens_M, config, ALL_TERMS).weights
    assert set(expected) == set(weights)
    expected_loss = sum(weights[name] * value for name, value in expected.items())
    expected_gradients = torch.autograd.grad(expected_loss, inputs)

    local_stats = rank_statistics(split, logits, config, experts, routers)
    total = RouterStats(
        *(sum(s.detach().double() for s in fields) for fields in zip(*local_stats, strict=True))
    )
    count = len(split)
    losses = linearize(
        total,
        tokens_M,
        config,
        ALL_TERMS,
        expert_copies=1 if count == 1 else count / 2,
        router_copies=count,
    )

    for name, value in expected.items():
        torch.testing.assert_close(
            losses.values[name],
            value.detach(),
            atol=1e-9,
            rtol=1e-7,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    loss = sum(losses.local_term(stats) for stats in local_stats)
    gradients = torch.autograd.grad(loss, inputs)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-9, rtol=1e-6)


def test_balance_loss_of_uniform_and_collapsed_routing() -> None:
    config, tokens = MoEConfig(num_experts=8), torch.tensor([60.0, 20.0])
    uniform = torch.full((1, 2, 8), 5.0)
    assert float(balance_loss(uniform, 4 * uniform, tokens, config)) == pytest.approx(1.0)
    collapsed = torch.zeros(1, 2, 8)
    collapsed[0, :, 3] = 40.0
    assert float(balance_loss(collapsed, collapsed, tokens, config)) == pytest.approx(8.0)


def test_balance_loss_with_pools() -> None:
    config = MoEConfig(num_experts=8, pools="modality", image_experts=6)
    pooled = torch.tensor([[[10.0] * 6 + [0.0] * 2, [0.0] * 6 + [10.0] * 2]])
    loss = balance_loss(pooled, pooled, torch.tensor([60.0, 20.0]), config)
    assert float(loss) == pytest.approx(1.0)
    # A pool without tokens is not included in the mean.
    pooled[0, 1] = 0.0
    loss = balance_loss(pooled, pooled, torch.tensor([60.0, 0.0]), config)
    assert float(loss) == pytest.approx(1.0)


def test_global_entropy_loss() -> None:
    four_used = torch.tensor([[0.25] * 4 + [0.0] * 4])
    assert float(global_entropy_loss(four_used, 4.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(global_entropy_loss(four_used, 3.0)) == 0.0
    assert float(global_entropy_loss(four_used, 8.0)) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_experts": 32}, (16.0, 8.0)),
        ({"num_experts": 8, "pools": "modality"}, (4.0, 2.0)),
        ({"num_experts": 8, "pools": "modality", "image_experts": 3}, (3.0, 2.0)),
        ({"num_experts": 2}, (1.0, 1.0)),
    ],
)
def test_default_target_num_experts(
    settings: dict[str, Any], expected: tuple[float, float]
) -> None:
    moe = MoEConfig(**settings)
    assert tuple(target_num_experts(BalanceConfig(), moe, m) for m in (0, 1)) == expected


def test_dense_trunk_has_zero_terms() -> None:
    stats = stack_stats([], 8, torch.device("cpu"))
    tokens_M = torch.zeros(2, dtype=torch.float64)
    losses = linearize(detached_double(stats), tokens_M, MoEConfig(), ALL_TERMS)
    assert all(float(value) == 0 for value in losses.values.values())
    assert float(losses.local_term(stats)) == 0


def test_empty_batch_has_finite_terms() -> None:
    config = MoEConfig(num_experts=EXPERTS, routing="noisy_top_k")
    tokens, _ = make_tokens([], PATCHES)
    stats = compute_stats(torch.zeros(LAYERS, 0, EXPERTS), tokens, config)
    tokens_M = torch.zeros(2, dtype=torch.float64)
    losses = linearize(detached_double(stats), tokens_M, config, ALL_TERMS)
    assert all(math.isfinite(float(value)) for value in losses.values.values())
    assert all(bool(torch.isfinite(c).all()) for c in losses.coefficients.values())


@pytest.mark.parametrize(("missing", "lengths", "patches"), [(0, [5, 4], 0), (1, [0, 0, 0], 3)])
def test_global_entropy_of_a_modality_without_tokens(
    missing: int, lengths: list[int], patches: int
) -> None:
    """Its mean distribution would be all zeros with entropy 0, so the term would be log S for any
    router."""
    config = MoEConfig(num_experts=EXPERTS)
    balance = BalanceConfig(
        balance_weight=0.0,
        router_z_weight=0.0,
        global_entropy_weight=PerModality(image=1.3, text=0.6),
    )
    tokens, token_list = make_tokens(lengths, patches)
    logits = 3 * torch.randn(LAYERS, len(token_list), EXPERTS)
    stats = compute_stats(logits, tokens, config)
    tokens_M = torch.tensor([9.0, 9.0])
    tokens_M[missing] = 0.0
    losses = linearize(detached_double(stats), tokens_M, config, balance)
    modality = ("image", "text")[missing]
    assert float(losses.values[f"global_entropy_{modality}"]) == 0.0
    assert not losses.coefficients["prob_sum_ME"][:, missing].any()


def test_without_weights_only_balance_and_z_are_reported() -> None:
    config = MoEConfig(num_experts=EXPERTS)
    tokens, token_list = make_tokens(LENGTHS, PATCHES)
    stats = compute_stats(torch.randn(LAYERS, len(token_list), EXPERTS), tokens, config)
    balance = BalanceConfig(balance_weight=0.0, router_z_weight=0.0)
    losses = linearize(detached_double(stats), torch.tensor([18.0, 17.0]), config, balance)
    assert set(losses.values) == {"balance", "router_z"}
    assert set(losses.weights.values()) == {0.0}
    assert not any(bool(c.any()) for c in losses.coefficients.values())
