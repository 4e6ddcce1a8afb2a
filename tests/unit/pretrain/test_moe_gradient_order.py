"""Gradients of the expert weights become available in the same order in every implementation: ZeRO
reduces them in that order."""

from __future__ import annotations

import pytest
import torch

from pretrain.moe.experts import StackedExperts, synchronize_grads


def gradient_order(backend: str, rows: int) -> list[str]:
    """Names of the weights in the order in which their gradients are accumulated."""
    experts = StackedExperts(16, 8, 4, backend)  # type: ignore[arg-type]
    order: list[str] = []
    for name, weight in experts.named_parameters():
        torch.nn.init.normal_(weight)
        weight.register_post_accumulate_grad_hook(lambda _weight, name=name: order.append(name))
    x = torch.randn(rows, 16, requires_grad=True)
    experts(x, torch.tensor([rows, 0, 0, 0])).square().sum().backward()
    return order


@pytest.mark.parametrize(
    ("backend", "rows"), [("loop", 5), ("grouped", 5), ("auto", 5), ("auto", 1000), ("auto", 0)]
)
def test_gradient_order_is_the_same_for_all_backends(backend: str, rows: int) -> None:
    assert gradient_order(backend, rows) == ["w3", "w2", "w1"]


def test_synchronize_grads_is_the_identity() -> None:
    weights = [torch.randn(3, requires_grad=True) for _ in range(3)]
    out = synchronize_grads(*weights)
    assert all(torch.equal(a, b) for a, b in zip(out, weights, strict=True))
    (out[0] + 2 * out[2]).sum().backward()
    gradients = [weight.grad.tolist() for weight in weights if weight.grad is not None]
    assert gradients == [[1.0] * 3, [0.0] * 3, [2.0] * 3]


def test_selecting_the_backend_does_not_access_the_weights() -> None:
    """Under ZeRO-3, accessing a weight starts an all-gather, which every rank must join."""
    experts = StackedExperts(16, 8, 4)
    x = torch.randn(3, 16)
    del experts.w1, experts.w2, experts.w3
    assert [experts.uses_loop(x, rows) for rows in (0, 3, 1000)] == [True, False, True]
