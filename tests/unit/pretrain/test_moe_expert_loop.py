"""The expert loop with weighted sums over a token's experts, against autograd on the formulas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.moe.expert_loop import loop_swiglu

WIDTH, HIDDEN = 16, 24


def random_weights(experts: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = (HIDDEN, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH)
    return [torch.randn(experts, *shape).mul(0.3).to(dtype).requires_grad_() for shape in shapes]


def reference_sums(
    x_TD: Tensor, sizes: list[int], token_N: Tensor, weight_N: Tensor, weights: list[Tensor]
) -> Tensor:
    """The weighted sums, row by row."""
    w1, w2, w3 = weights
    out = [torch.zeros(WIDTH, dtype=x_TD.dtype) for _ in x_TD]
    expert_N = [expert for expert, size in enumerate(sizes) for _ in range(size)]
    for expert, token, weight in zip(expert_N, token_N.tolist(), weight_N, strict=True):
        x = x_TD[token]
        y = w2[expert] @ (F.silu(w1[expert] @ x) * (w3[expert] @ x))
        out[token] = out[token] + weight * y
    return torch.stack(out)


def test_sums_over_many_experts_accumulate_in_float32() -> None:
    """64 equal experts of weight 1/64 give the result of one expert; sums in bfloat16 would be off
    by several percent."""
    torch.manual_seed(0)
    experts, tokens = 64, 5
    single = random_weights(1, torch.bfloat16)
    repeated = [
        weight.detach().expand(experts, -1, -1).contiguous().requires_grad_() for weight in single
    ]
    sizes, token_N = torch.full((experts,), tokens), torch.arange(tokens).repeat(experts)
    x_TD = torch.randn(tokens, WIDTH).bfloat16().requires_grad_()

    weights_N = torch.full((experts * tokens,), 1 / experts)
    y_TD = loop_swiglu(x_TD, sizes, *repeated, token_N, weights_N)
    expected_TD = loop_swiglu(
        x_TD, torch.tensor([tokens]), *single, torch.arange(tokens), torch.ones(tokens)
    )
    probe = torch.randn(tokens, WIDTH).bfloat16()
    (grad,) = torch.autograd.grad(y_TD, [x_TD], probe)
    (expected_grad,) = torch.autograd.grad(expected_TD, [x_TD], probe)

    # 1/64 is exact in bfloat16, so only the last rounding of the sums may differ.
    for actual, expected in ((y_TD, expected_TD), (grad, expected_grad)):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected, rtol=2**-8, atol=1e-6)


def test_gradient_of_zero_weights() -> None:
    """The backward pass divides by the weight; an underflowed score must not give NaN."""
    torch.manual_seed(1)
    sizes, token_N = [3, 0, 4], torch.tensor([0, 2, 4, 1, 2, 3, 4])
    weights = random_weights(3, torch.float32)
    x_TD = torch.randn(5, WIDTH, requires_grad=True)
    weight_N = torch.tensor([0.5, 0.0, 1.0, 0.3, 0.7, 0.0, 0.0], requires_grad=True)

    y_TD = loop_swiglu(x_TD, torch.tensor(sizes), *weights, token_N, weight_N)
    expected_TD = reference_sums(x_TD, sizes, token_N, weight_N, weights)
    torch.testing.assert_close(y_TD, expected_TD)

    probe, inputs = torch.randn(5, WIDTH), [x_TD, weight_N, *weights]
    gradients = torch.autograd.grad(y_TD, inputs, probe)
    expected_gradients = torch.autograd.grad(expected_TD, inputs, probe)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
