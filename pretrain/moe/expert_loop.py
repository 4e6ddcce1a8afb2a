"""SwiGLU experts computed one after the other, with a custom backward pass: the fast path on CPU.

Each expert gathers its tokens from the activations and adds its outputs to the result. The rows of
all experts are never in memory at once, and the rows of one expert are still in the cache when
they are used again. Weight gradients are written directly into the stacked tensors; autograd would
store more, copy more, and accumulate a full-size gradient for every slice.

The gradient of an assignment's weight is computed as <h, g W2>, because g W2 is needed for the
gradient of h anyway. The direct form <h W2^T, g> would require storing the expert outputs. At that
point g already includes the weight, so the result is divided by it.

Shapes: T tokens, N rows, n rows of one expert, D trunk width, F expert width, L experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MIN_WEIGHT = 1e-20
"""Lower bound of the weights in the backward pass, which divides by them. The slope of a softmax or
sigmoid with such a small value is zero."""


def loop_swiglu(
    x: Tensor,
    rows_per_expert_L: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    token_N: Tensor | None = None,
    weights_N: Tensor | None = None,
) -> Tensor:
    """Apply each expert to its rows.

    Args:
        x: Rows sorted by expert, `[rows, width]`; or tokens, `[tokens, width]`, with `token_N`.
        rows_per_expert_L: Number of rows of each expert, int64.
        w1: Gate weights `[experts, F, width]`; same dtype as `x`, like `w2` and `w3`.
        w2: Down-projection weights `[experts, width, F]`.
        w3: Up-projection weights `[experts, F, width]`.
        token_N: Token index of each row, rows sorted by expert, int64.
        weights_N: Gate weight of each row; required with `token_N`.

    Returns:
        `[rows, width]`; with `token_N` the weighted sums over each token's rows, `[tokens, width]`.
    """
    sizes = tuple(rows_per_expert_L.tolist())
    return _Loop.apply(x, weights_N, w1, w2, w3, token_N, sizes)  # type: ignore[no-any-return]


class _Loop(torch.autograd.Function):
    """`loop_swiglu` with the number of rows of each expert on the host (`sizes`)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights_N: Tensor | None,
        w1: Tensor,
        w2: Tensor,
        w3: Tensor,
        token_N: Tensor | None,
        sizes: tuple[int, ...],
    ) -> Tensor:
        num_rows, hidden = sum(sizes), w1.shape[1]
        gate_NF, up_NF = x.new_empty(num_rows, hidden), x.new_empty(num_rows, hidden)
        out = torch.zeros_like(x) if token_N is None else _accumulator(x)

        for expert, rows in _nonempty_experts(sizes):
            x_nD = x[rows] if token_N is None else x.index_select(0, token_N[rows])
            gate_nF = torch.mm(x_nD, w1[expert].t(), out=gate_NF[rows])
            up_nF = torch.mm(x_nD, w3[expert].t(), out=up_NF[rows])
            h_nF = torch.nn.functional.silu(gate_nF).mul_(up_nF)
            if token_N is None:
                torch.mm(h_nF, w2[expert].t(), out=out[rows])
            else:
                y_nD = torch.mm(h_nF, w2[expert].t()).to(out.dtype)
                assert weights_N is not None
                out.index_add_(0, token_N[rows], y_nD.mul_(weights_N[rows].unsqueeze(1)))

        ctx.save_for_backward(x, weights_N, w1, w2, w3, token_N, gate_NF, up_NF)
        ctx.sizes = sizes
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights_N, w1, w2, w3, token_N, gate_NF, up_NF = ctx.saved_tensors
        grad = grad.contiguous()
        grad_w1, grad_w2, grad_w3 = _weight_gradients((w1, w2, w3), ctx.sizes)
        grad_x = torch.zeros_like(x) if token_N is None else _accumulator(x)
        grad_weights = None if weights_N is None else torch.zeros_like(weights_N)

        for expert, rows in _nonempty_experts(ctx.sizes):
            x_nD = x[rows] if token_N is None else x.index_select(0, token_N[rows])
            grad_nD = grad[rows] if token_N is None else grad.index_select(0, token_N[rows])
            gate_nF, up_nF = gate_NF[rows], up_NF[rows]
            if weights_N is not None:
                weight_n1 = weights_N[rows].clamp(min=MIN_WEIGHT).unsqueeze(1)
                grad_nD = (grad_nD * weight_n1).to(x.dtype)

            silu_nF = torch.nn.functional.silu(gate_nF)
            torch.mm(grad_nD.t(), silu_nF * up_nF, out=grad_w2[expert])
            grad_h_nF = torch.mm(grad_nD, w2[expert])
            grad_up_nF = silu_nF * grad_h_nF
            grad_silu_nF = grad_h_nF.mul_(up_nF)
            if weights_N is not None and grad_weights is not None:
                # <h, g W2>, where g already includes the weight.
                product_n = silu_nF.mul_(grad_silu_nF).sum(dim=1)
                grad_weights[rows] = product_n.to(grad_weights.dtype) / weight_n1.squeeze(1)

            grad_gate_nF = torch.ops.aten.silu_backward(grad_silu_nF, gate_nF)
            torch.mm(grad_gate_nF.t(), x_nD, out=grad_w1[expert])
            torch.mm(grad_up_nF.t(), x_nD, out=grad_w3[expert])
            grad_nD = torch.mm(grad_gate_nF, w1[expert]).addmm_(grad_up_nF, w3[expert])
            if token_N is None:
                grad_x[rows] = grad_nD
            else:
                grad_x.index_add_(0, token_N[rows], grad_nD.to(grad_x.dtype))

        return grad_x.to(x.dtype), grad_weights, grad_w1, grad_w2, grad_w3, None, None


def _nonempty_experts(sizes: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for the experts that have rows."""
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            yield expert, slice(start, start + size)
        start += size


def _weight_gradients(weights: tuple[Tensor, ...], sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Uninitialized gradients of the stacked weights, with zeros for experts without rows."""
    gradients = tuple(torch.empty_like(weight) for weight in weights)
    for expert, size in enumerate(sizes):
        if not size:
            for gradient in gradients:
                gradient[expert].zero_()
    return gradients


def _accumulator(x: Tensor) -> Tensor:
    """Zeros of the shape of `x` to accumulate rows in: float32 for 16-bit activations, which would
    round after each expert."""
    is_16_bit = x.dtype in (torch.bfloat16, torch.float16)
    return torch.zeros_like(x, dtype=torch.float32 if is_16_bit else x.dtype)
