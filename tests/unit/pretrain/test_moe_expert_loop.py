"""Experts one after the other, with the sums over a token's experts inside: against autograd on
plain formulas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.moe.expert_loop import loop_swiglu

WIDTH, HIDDEN = 16, 24


def weights_of(experts: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = (HIDDEN, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH)
    return [torch.randn(experts, *shape).mul(0.3).to(dtype).requires_grad_() for shape in shapes]


def slow_sums(
    x_TD: Tensor, sizes: list[int], token_N: Tensor, weight_N: Tensor, weights: list[Tensor]
) -> Tensor:
    """The weighted sums row by row."""
    w1, w2, w3 = weights
    out = [torch.zeros(WIDTH, dtype=x_TD.dtype) for _ in x_TD]
    expert_N = [expert for expert, size in enumerate(sizes) for _ in range(size)]
    for expert, token, weight in zip(expert_N, token_N.tolist(), weight_N, strict=True):
        x = x_TD[token]
        out[token] = out[token] + weight * (
            w2[expert] @ (F.silu(w1[expert] @ x) * (w3[expert] @ x))
        )
    return torch.stack(out)


def test_sums_over_many_experts_do_not_round_in_bfloat16() -> None:
    """64 equal experts of weight 1/64 answer what one does; sums kept in bfloat16 would be off by
    percents."""
    torch.manual_seed(0)
    experts, tokens = 64, 5
    one = weights_of(1, torch.bfloat16)
    many = [weight.detach().expand(experts, -1, -1).contiguous().requires_grad_() for weight in one]
    sizes, token_N = torch.full((experts,), tokens), torch.arange(tokens).repeat(experts)
    x_TD = torch.randn(tokens, WIDTH).bfloat16().requires_grad_()
    y_TD = loop_swiglu(x_TD, sizes, *many, token_N, torch.full((experts * tokens,), 1 / experts))
    alone_TD = loop_swiglu(
        x_TD, torch.tensor([tokens]), *one, torch.arange(tokens), torch.ones(tokens)
    )
    probe = torch.randn(tokens, WIDTH).bfloat16()
    (grad,), (grad_alone,) = (torch.autograd.grad(y, [x_TD], probe) for y in (y_TD, alone_TD))
    # 1/64 is exact in bfloat16, so that all but the last rounding of the sums is the same.
    for found, right in ((y_TD, alone_TD), (grad, grad_alone)):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, right, rtol=2**-8, atol=1e-6)


def test_a_choice_of_weight_zero_has_a_gradient() -> None:
    """The way back divides by the weight; a score that underflowed must not become NaN."""
    torch.manual_seed(1)
    sizes, token_N = [3, 0, 4], torch.tensor([0, 2, 4, 1, 2, 3, 4])
    weights = weights_of(3, torch.float32)
    x_TD = torch.randn(5, WIDTH, requires_grad=True)
    weight_N = torch.tensor([0.5, 0.0, 1.0, 0.3, 0.7, 0.0, 0.0], requires_grad=True)
    y_TD = loop_swiglu(x_TD, torch.tensor(sizes), *weights, token_N, weight_N)
    true_TD = slow_sums(x_TD, sizes, token_N, weight_N, weights)
    torch.testing.assert_close(y_TD, true_TD)
    probe, inputs = torch.randn(5, WIDTH), [x_TD, weight_N, *weights]
    for found, right in zip(
        torch.autograd.grad(y_TD, inputs, probe),
        torch.autograd.grad(true_TD, inputs, probe),
        strict=True,
    ):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
