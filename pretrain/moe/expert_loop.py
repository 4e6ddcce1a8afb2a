"""SwiGLU experts one after the other, with the backward pass written out: the fast way on CPU.

Each expert takes its tokens from the activations and adds its answers back, so the rows of all
experts never exist side by side, and an expert's rows are still in the cache when they are needed
next. Its weight gradients are written straight into their place in the stack. Autograd would hold
more, copy more, and add up a full-size gradient for every slice.

The gradient of a choice's weight is taken as <h, g W2>, which the way back to h needs anyway,
instead of <h W2^T, g>, for which the answers would have to be kept. On that way g is weighted
already, and the weight is divided out again.

Shapes: T tokens, N rows, n rows of one expert, D trunk width, F expert width, L experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALLEST = 1e-20
"""Least weight in the backward pass, which divides by it. A softmax or sigmoid so far down has no
slope left."""


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
        x: Rows sorted by expert `[rows, width]`; or tokens `[tokens, width]`, with `token_N`.
        rows_per_expert_L: Rows of each expert, int64.
        w1: Gate weights `[experts, F, width]`, of the type of `x`; so are `w2` (down) and `w3`
            (up).
        w2: Down weights `[experts, width, F]`.
        w3: Up weights `[experts, F, width]`.
        token_N: The token of each row, sorted by expert, int64.
        weights_N: The weight of each row.

    Returns:
        `[rows, width]`; or the weighted sums over each token's rows, `[tokens, width]`.
    """
    sizes = tuple(rows_per_expert_L.tolist())
    return _Loop.apply(x, weights_N, w1, w2, w3, token_N, sizes)  # type: ignore[no-any-return]


class _Loop(torch.autograd.Function):
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
        rows, hidden = sum(sizes), w1.shape[1]
        gate_NF, up_NF = x.new_empty(rows, hidden), x.new_empty(rows, hidden)
        out = torch.zeros_like(x) if token_N is None else _sums(x)
        for expert, at in _pieces(sizes):
            mine = slice(at, at + sizes[expert])
            x_nD = x[mine] if token_N is None else x.index_select(0, token_N[mine])
            gate_nF = torch.mm(x_nD, w1[expert].t(), out=gate_NF[mine])
            up_nF = torch.mm(x_nD, w3[expert].t(), out=up_NF[mine])
            h_nF = torch.nn.functional.silu(gate_nF).mul_(up_nF)
            if token_N is None:
                torch.mm(h_nF, w2[expert].t(), out=out[mine])
            else:
                y_nD = torch.mm(h_nF, w2[expert].t()).to(out.dtype)
                assert weights_N is not None
                out.index_add_(0, token_N[mine], y_nD.mul_(weights_N[mine].unsqueeze(1)))
        ctx.save_for_backward(x, weights_N, w1, w2, w3, token_N, gate_NF, up_NF)
        ctx.sizes = sizes
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights_N, w1, w2, w3, token_N, gate_NF, up_NF = ctx.saved_tensors
        sizes: tuple[int, ...] = ctx.sizes
        grad = grad.contiguous()
        grads = [torch.empty_like(w) for w in (w1, w2, w3)]
        for expert, size in enumerate(sizes):
            if not size:
                for g in grads:
                    g[expert].zero_()
        grad_x = torch.zeros_like(x) if token_N is None else _sums(x)
        grad_weights = None if weights_N is None else torch.zeros_like(weights_N)
        for expert, at in _pieces(sizes):
            mine = slice(at, at + sizes[expert])
            x_nD = x[mine] if token_N is None else x.index_select(0, token_N[mine])
            grad_nD = grad[mine] if token_N is None else grad.index_select(0, token_N[mine])
            gate_nF, up_nF = gate_NF[mine], up_NF[mine]
            if weights_N is not None:
                weight_n1 = weights_N[mine].clamp(min=SMALLEST).unsqueeze(1)
                grad_nD = (grad_nD * weight_n1).to(x.dtype)
            silu_nF = torch.nn.functional.silu(gate_nF)
            torch.mm(grad_nD.t(), silu_nF * up_nF, out=grads[1][expert])
            grad_h_nF = torch.mm(grad_nD, w2[expert])
            grad_up_nF = silu_nF * grad_h_nF
            grad_silu_nF = grad_h_nF.mul_(up_nF)
            if weights_N is not None and grad_weights is not None:
                # <h, g W2>, where g holds the weight already.
                found_n = silu_nF.mul_(grad_silu_nF).sum(dim=1)
                grad_weights[mine] = found_n.to(grad_weights.dtype) / weight_n1.squeeze(1)
            grad_gate_nF = torch.ops.aten.silu_backward(grad_silu_nF, gate_nF)
            torch.mm(grad_gate_nF.t(), x_nD, out=grads[0][expert])
            torch.mm(grad_up_nF.t(), x_nD, out=grads[2][expert])
            grad_nD = torch.mm(grad_gate_nF, w1[expert]).addmm_(grad_up_nF, w3[expert])
            if token_N is None:
                grad_x[mine] = grad_nD
            else:
                grad_x.index_add_(0, token_N[mine], grad_nD.to(grad_x.dtype))
        return grad_x.to(x.dtype), grad_weights, *grads, None, None


def _pieces(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """(expert, its first row) of the experts that have rows."""
    pieces, at = [], 0
    for expert, size in enumerate(sizes):
        if size:
            pieces.append((expert, at))
        at += size
    return pieces


def _sums(x: Tensor) -> Tensor:
    """Zeros to add rows into: float32 for 16-bit activations, whose sums over experts would round
    at each one."""
    return torch.zeros_like(
        x, dtype=torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    )
