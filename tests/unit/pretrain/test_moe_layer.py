"""The MoE layer against a slow reference: output, gradients and statistics, for every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.moe.routing import count_ids
from pretrain.moe.statistics import GRADIENT_FIELDS
from tests.support.moe_layers import (
    LENGTHS,
    OPTIONS,
    PATCHES,
    WIDTH,
    make_layer,
    parametrize_options,
)
from tests.support.reference_moe import (
    make_tokens,
    reference_logits,
    reference_moe,
)
from tests.support.reference_statistics import reference_statistics


@parametrize_options({"caption gate": {"num_experts": 4, "top_k": 2, "router_input": "caption"}})
@pytest.mark.parametrize(
    "balance",
    [{}, {"bias": "sign"}, {"bias": "zscore", "bias_per_modality": True}],
    ids=["", "bias", "two biases"],
)
def test_layer_equals_the_reference(settings: dict[str, Any], balance: dict[str, Any]) -> None:
    is_noisy = settings.get("routing") == "noisy_top_k"
    layer = make_layer(balance | ({"load_weight": 1.0} if is_noisy else {}), **settings)
    tokens, token_list = make_tokens(
        LENGTHS, PATCHES, ids=[5, 900, 7, 8], groups=[0, 0, 1, 1], step_seed=123
    )
    x = torch.randn(len(token_list), WIDTH, dtype=torch.float64, requires_grad=True)
    y, stats = layer(x, tokens)
    expected_y, routing = reference_moe(layer, x, token_list, step_seed=123)
    expected = reference_statistics(
        layer, reference_logits(layer, x, token_list), routing, token_list
    )

    # Noise and the caption gate are computed in float32.
    is_float32 = is_noisy or settings.get("router_input") == "caption"
    atol, rtol = (1e-5, 1e-5) if is_float32 else (1e-11, 1e-9)
    torch.testing.assert_close(y, expected_y, atol=atol, rtol=rtol)
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(stats, name),
            value,
            msg=lambda text, name=name: f"{name}: {text}",
            atol=atol,
            rtol=rtol,
        )

    probe = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    loss, expected_loss = (y * probe).sum(), (expected_y * probe).sum()
    for name, value in expected.items():
        if name in GRADIENT_FIELDS:
            field_probe = torch.randn_like(value)
            loss = loss + (getattr(stats, name) * field_probe).sum()
            expected_loss = expected_loss + (value * field_probe).sum()
    gradients = torch.autograd.grad(loss, inputs)
    expected_gradients = torch.autograd.grad(expected_loss, inputs)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=10 * atol, rtol=10 * rtol)


@parametrize_options()
def test_backends_are_equal(settings: dict[str, Any]) -> None:
    """Also with dropped assignments, whose rows the grouped product leaves uninitialized."""
    results = []
    for backend in ("loop", "grouped"):
        layer = make_layer(**settings, backend=backend).float()
        tokens, token_list = make_tokens(LENGTHS, PATCHES, groups=[0, 0, 1, 1], step_seed=4)
        torch.manual_seed(7)
        x = torch.randn(len(token_list), WIDTH, requires_grad=True)
        y, _ = layer(x, tokens)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for loop, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, loop, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings", [*OPTIONS.values(), {"num_experts": 4, "router_input": "caption"}]
)
def test_empty_batch_has_zero_gradients(settings: dict[str, Any]) -> None:
    layer = make_layer(**settings)
    tokens, _ = make_tokens([], PATCHES)
    y, stats = layer(torch.zeros(0, WIDTH, dtype=torch.float64), tokens)
    (y.sum() + stats.prob_sum_ME.sum() + stats.z_sum_M.sum()).backward()
    assert y.shape == (0, WIDTH)
    assert stats.assignments_ME.sum() == 0
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_top1_and_coactivation_statistics() -> None:
    layer = make_layer(num_experts=5, top_k=2)
    tokens, token_list = make_tokens(LENGTHS, PATCHES)
    x = torch.randn(len(token_list), WIDTH, dtype=torch.float64)
    _, stats = layer(x, tokens._replace(coactivation=True))
    _, routing = reference_moe(layer, x, token_list)

    top1, top1_prob = torch.zeros(2, 5), torch.zeros(2)
    coactivation = torch.zeros(5, 5)
    for token, assigned, scores in zip(
        token_list, routing.assignments, routing.scores, strict=True
    ):
        top1[token.modality, assigned[0][0]] += 1
        top1_prob[token.modality] += float(scores.detach().max())
        for a, _ in assigned:
            for b, _ in assigned:
                coactivation[a, b] += 1

    assert torch.equal(stats.top1_ME, top1.long())
    assert torch.equal(stats.coactivation_EE, coactivation.long())
    torch.testing.assert_close(stats.top1_prob_sum_M.float(), top1_prob)
    assert layer(x, tokens)[1].coactivation_EE.numel() == 0


def test_count_ids() -> None:
    assert count_ids(torch.tensor([3, 3, 0]), 5).tolist() == [1, 0, 0, 2, 0]
