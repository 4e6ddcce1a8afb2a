"""The sparse layer against a slow loop, and the two ways of computing experts against each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config.schema import MoEConfig
from pretrain.moe.balance import balance_share, router_z_share
from pretrain.moe.dispatch import LocalDispatcher
from pretrain.moe.experts import grouped_swiglu, loop_swiglu
from pretrain.moe.layer import MoELayer
from pretrain.moe.routing import count_ids, gate_scores, topk_route
from pretrain.moe.statistics import router_stats

WIDTH = 16


def make_layer(**settings: object) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(WIDTH, MoEConfig(expert_width=24, **settings))  # type: ignore[arg-type]
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.double()


def slow_moe(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    config = layer.config
    rows = []
    for x in x_TD:
        logits = (layer.gate.weight.float() @ x.float()) * config.temperature
        scores = torch.softmax(logits, 0) if config.score == "softmax" else torch.sigmoid(logits)
        best = scores.argsort(descending=True)[: config.experts_per_token]
        weights = scores[best] / scores[best].sum() if config.renormalise and len(best) > 1 else scores[best]
        y = torch.zeros_like(x)
        for weight, expert in zip(weights, best.tolist(), strict=True):
            w1, w2, w3 = (w[expert] for w in (layer.experts.w1, layer.experts.w2, layer.experts.w3))
            y = y + weight * (w2 @ (F.silu(w1 @ x) * (w3 @ x)))
        if layer.shared is not None:
            gate, up = (layer.shared.gate_up @ x).chunk(2)
            y = y + layer.shared.down @ (F.silu(gate) * up)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts": 4, "experts_per_token": 1},
        {"num_experts": 8, "experts_per_token": 2, "shared_experts": 0},
        {"num_experts": 6, "experts_per_token": 6, "renormalise": False},
        {"num_experts": 8, "experts_per_token": 3, "score": "sigmoid", "shared_experts": 2, "temperature": 2.0},
    ],
)
def test_layer_equals_the_loop_forward_and_gradient(settings: dict[str, object]) -> None:
    layer = make_layer(**settings)
    x = torch.randn(13, WIDTH, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x, torch.zeros(13, dtype=torch.int64))
    true = slow_moe(layer, x)
    torch.testing.assert_close(y, true, atol=1e-6, rtol=1e-6)
    probe = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    mine = torch.autograd.grad((y * probe).sum(), inputs, retain_graph=True)
    for found, expected in zip(mine, torch.autograd.grad((true * probe).sum(), inputs), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("counts", [[3, 0, 5, 4], [12, 0, 0, 0], [0, 0, 0, 7]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_grouped_experts_equal_the_loop(counts: list[int], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(1)
    rows = torch.randn(sum(counts), 16).to(dtype).requires_grad_()
    weights = [torch.randn(4, *shape).mul(0.2).to(dtype).requires_grad_() for shape in ((24, 16), (16, 24), (24, 16))]
    sizes = torch.tensor(counts)
    results = []
    for compute in (loop_swiglu, grouped_swiglu):
        y = compute(rows, sizes, *weights)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), [rows, *weights])))
    for looped, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, looped, atol=tolerance, rtol=tolerance)


def test_every_token_choice_lands_once_and_comes_home() -> None:
    torch.manual_seed(2)
    routing = topk_route(torch.rand(50, 8), 3, renormalise=True)
    x = torch.randn(50, 4)
    sent = LocalDispatcher().send(x, routing)
    assert torch.equal(sent.order_N.sort().values, torch.arange(150))
    assert torch.equal(sent.rows_per_expert_L, torch.bincount(routing.expert_ids_TK.flatten(), minlength=8))
    # Weights sum to one, so experts that do nothing give the token back.
    torch.testing.assert_close(LocalDispatcher().combine(sent.rows_ND, sent, routing), x)


def test_an_empty_batch_has_gradients_of_zero() -> None:
    layer = make_layer(num_experts=4)
    y, stats = layer(torch.zeros(0, WIDTH, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
    (y.sum() + stats.prob_sum_E.sum()).backward()
    assert y.shape == (0, WIDTH)
    assert stats.choices_ME.sum() == 0
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_router_stays_in_float32_under_bfloat16() -> None:
    layer = make_layer(num_experts=4).to(torch.bfloat16)
    assert layer.gate(torch.randn(3, WIDTH, dtype=torch.bfloat16)).dtype == torch.float32


def test_balance_loss_is_one_when_even_and_grows_when_all_choose_the_same() -> None:
    even_PE = torch.full((1, 8), 10.0)
    assert float(balance_share(even_PE, torch.full((1, 8), 20.0), torch.tensor(80.0))) == pytest.approx(1.0)
    certain = torch.zeros(1, 8)
    certain[0, 3] = 80.0
    assert float(balance_share(certain, certain, torch.tensor(80.0))) == pytest.approx(8.0)


def test_shares_of_a_split_batch_add_up_to_the_whole() -> None:
    torch.manual_seed(3)
    logits, modality = torch.randn(40, 6), torch.randint(0, 2, (40,))
    scores = gate_scores(logits, "softmax", 1.0)
    ids = topk_route(scores, 2, renormalise=True).expert_ids_TK
    whole = router_stats(logits, scores, ids, modality)
    tokens, choices = torch.tensor(40.0), whole.choices_ME.sum(0, keepdim=True)
    balance = balance_share(whole.prob_sum_E[None], choices, tokens)
    z = router_z_share(whole.z_sum[None], tokens)
    parts = [router_stats(logits[s], scores[s], ids[s], modality[s]) for s in (slice(0, 7), slice(7, 40))]
    torch.testing.assert_close(sum(balance_share(p.prob_sum_E[None], choices, tokens) for p in parts), balance)
    torch.testing.assert_close(sum(router_z_share(p.z_sum[None], tokens) for p in parts), z)
    torch.testing.assert_close(z, torch.logsumexp(logits, 1).square().mean())
    probs = scores.mean(0)
    share = torch.bincount(ids.flatten(), minlength=6) / 80
    torch.testing.assert_close(balance, 6 * (probs * share).sum())


def test_statistics_by_modality() -> None:
    ids = torch.tensor([[0, 1], [1, 2], [2, 0]])
    scores = torch.full((3, 4), 0.25)
    stats = router_stats(scores.log(), scores, ids, torch.tensor([0, 1, 1]))
    assert stats.choices_ME.tolist() == [[1, 1, 0, 0], [1, 1, 2, 0]]
    torch.testing.assert_close(stats.entropy_sum_M, torch.tensor([1.0, 2.0]) * torch.tensor(4.0).log())
    assert count_ids(torch.tensor([3, 3, 0]), 5).tolist() == [1, 0, 0, 2, 0]
