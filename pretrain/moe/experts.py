"""The routed experts of a layer: SwiGLU networks with weights stacked in three tensors.

There are two equivalent implementations. `loop` computes one expert after the other
(`pretrain.moe.expert_loop`); on CPU it is as fast or faster, with less memory, if each expert has
many rows. `grouped` uses one grouped matrix product for all experts. It is the default on GPU,
because in bfloat16 on Hopper the host does not need the number of rows per expert, and on CPU with
few rows per expert, where the overhead of the loop matters.

Shapes: T tokens, N rows, D trunk width, F expert width, L local experts.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.moe.expert_loop import loop_swiglu

Backend = Literal["auto", "grouped", "loop"]

LOOP_MIN_ROWS_PER_EXPERT = 128
"""Mean number of rows per expert from which `auto` uses the loop on CPU. Milliseconds for forward
and backward on one core in float32, loop and grouped, for (tokens, width, expert width, experts,
k): 64,128,64,64,2 (2 rows per expert): 6.7, 2.5; 512,128,64,64,2 (16): 9.5, 6.5; 1024,256,128,128,4
(32): 54, 51; 4096,256,512,64,2 (128): 246, 245; 2560,128,64,32,3 (240): 21, 24."""


class StackedExperts(nn.Module):
    """`num_experts` SwiGLU networks."""

    def __init__(
        self, width: int, expert_width: int, num_experts: int, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        # Linear's layout [out, in]; DeepSpeed's expert checkpoints use the same names w1 (gate),
        # w2 (down) and w3 (up).
        self.w1 = nn.Parameter(torch.empty(num_experts, expert_width, width))
        self.w2 = nn.Parameter(torch.empty(num_experts, width, expert_width))
        self.w3 = nn.Parameter(torch.empty(num_experts, expert_width, width))
        self.backend = backend
        # Stored separately: outside of `forward`, reading the shape of weights that ZeRO-3 has
        # partitioned gathers them, and a rank that reads it would wait for ranks that do not.
        self._sizes = num_experts, expert_width, width

    def forward(
        self,
        x: Tensor | None = None,
        rows_per_expert_L: Tensor | None = None,
        token_N: Tensor | None = None,
        weights_N: Tensor | None = None,
    ) -> Tensor:
        """Apply each expert to its rows.

        All uses of the weights go through `forward`, so that partitioned weights (ZeRO-3) are
        gathered.

        Args:
            x: Rows sorted by expert, `[rows, width]`; or tokens, `[tokens, width]`, with `token_N`.
                Without `x`, the result is the sum of all absolute weights, a float32 scalar.
            rows_per_expert_L: Number of rows of each expert, int64; rows beyond their sum belong to
                no expert.
            token_N: Token index of each row (`loop` only).
            weights_N: Gate weight of each row, float32, with `token_N`.

        Returns:
            `[rows, width]`, undefined in rows that belong to no expert; with `token_N` the weighted
            sums, `[tokens, width]`.
        """
        if x is None:
            return l1_norm(self.w1, self.w2, self.w3)
        assert rows_per_expert_L is not None
        w1, w2, w3 = (weight.to(x.dtype) for weight in synchronize_grads(self.w1, self.w2, self.w3))
        if token_N is not None or self.uses_loop(x, x.shape[0]):
            return loop_swiglu(x, rows_per_expert_L, w1, w2, w3, token_N, weights_N)
        return grouped_swiglu(x, rows_per_expert_L, w1, w2, w3)

    def uses_loop(self, x: Tensor, rows: int) -> bool:
        """Whether `rows` rows with the dtype of `x` are computed expert by expert.

        The loop is also used for zero rows and for widths and dtypes that the grouped product does
        not support.
        """
        if self.backend != "auto" or rows == 0:
            return self.backend == "loop" or rows == 0
        if x.is_cuda:
            return False
        num_experts, hidden, width = self._sizes
        is_supported = (
            x.dtype in (torch.float32, torch.bfloat16) and width % 8 == 0 and hidden % 8 == 0
        )
        return not is_supported or rows >= LOOP_MIN_ROWS_PER_EXPERT * num_experts


def synchronize_grads(*weights: Tensor) -> tuple[Tensor, ...]:
    """Return the weights unchanged, but make their gradients become available one after the other,
    the last weight's first, whichever implementation computes them.

    ZeRO stages 2 and 3 reduce gradients over ranks in the order in which they become available. A
    rank with no rows, or on CPU with few, uses another implementation than its peers; without this
    function its gradient of w1 would be added to their gradient of w2.
    """
    # Each view is a separate node of the autograd graph, and nodes created later run first.
    views: tuple[Tensor, ...] = _SynchronizeGrads.apply(*(w.view_as(w) for w in weights))
    return views


class _SynchronizeGrads(torch.autograd.Function):
    """Identity whose backward runs when the gradients of all outputs are available."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


def l1_norm(*weights: Tensor) -> Tensor:
    """Sum of all absolute values, float32 scalar."""
    return torch.stack([weight.float().abs().sum() for weight in weights]).sum()


def grouped_swiglu(
    rows_ND: Tensor, rows_per_expert_L: Tensor, w1: Tensor, w2: Tensor, w3: Tensor
) -> Tensor:
    """All experts in three grouped matrix products.

    In bfloat16 on GPUs of compute capability 9.0 and 10.0 (H100, H200, B200), the number of rows
    per expert stays on the device. In all other cases, such as float32 on any GPU and bfloat16 on
    an A100, torch copies the offsets to the host and multiplies expert by expert
    (`_grouped_mm_fallback` in ATen's `GroupedMMUtils.h`), so every product synchronizes with the
    host.

    Rows beyond the last offset are uninitialized memory, in the result and in the gradient; mask
    both with `pretrain.moe.dispatch.zero_rows_from`.
    """
    ends_L = rows_per_expert_L.cumsum(0).to(torch.int32)
    gate_NF = F.grouped_mm(rows_ND, w1.transpose(-2, -1), offs=ends_L)
    up_NF = F.grouped_mm(rows_ND, w3.transpose(-2, -1), offs=ends_L)
    return F.grouped_mm(F.silu(gate_NF) * up_NF, w2.transpose(-2, -1), offs=ends_L)
