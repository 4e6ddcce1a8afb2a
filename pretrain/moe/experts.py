"""The experts of a layer: SwiGLU networks whose weights are stacked in three tensors.

Two ways to compute the same thing: `loop` (one expert after the other, written out in
`pretrain.moe.expert_loop`; on CPU the faster one, or as fast with less memory, while experts have
many rows) and `grouped` (one grouped matrix product for all; what a GPU wants, because in bfloat16
on Hopper the host need not know how many rows each expert has, and a CPU with few rows an expert,
where the loop's own steps would count).

Shapes: T tokens, N rows, D trunk width, F expert width, L local experts.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.moe.expert_loop import loop_swiglu

Backend = Literal["auto", "grouped", "loop"]

MANY_ROWS = 128
"""From so many rows an expert the CPU loops. Forward and backward on one core, float32,
milliseconds looped and grouped (tokens, width, expert width, experts, k): 64,128,64,64,2 (2 rows):
6.7, 2.5; 512,128,64,64,2 (16): 9.5, 6.5; 1024,256,128,128,4 (32): 54, 51; 4096,256,512,64,2 (128):
246, 245; 2560,128,64,32,3 (240): 21, 24."""


class StackedExperts(nn.Module):
    """`num_experts` SwiGLU networks."""

    def __init__(
        self, width: int, expert_width: int, num_experts: int, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        # Linear's layout [out, in]; the names w1 (gate), w2 (down), w3 (up) are the ones that
        # DeepSpeed's expert checkpoints know.
        self.w1 = nn.Parameter(torch.empty(num_experts, expert_width, width))
        self.w2 = nn.Parameter(torch.empty(num_experts, width, expert_width))
        self.w3 = nn.Parameter(torch.empty(num_experts, expert_width, width))
        self.backend = backend
        # Kept apart: outside of `forward` a look at the shape of weights that ZeRO has partitioned
        # gathers them, and ranks that look and ranks that do not would wait for each other.
        self._sizes = num_experts, expert_width, width

    def forward(
        self,
        x: Tensor | None = None,
        rows_per_expert_L: Tensor | None = None,
        token_N: Tensor | None = None,
        weights_N: Tensor | None = None,
    ) -> Tensor:
        """Apply expert l to its rows; every use goes through here, so that partitioned weights are
        gathered.

        Args:
            x: Rows sorted by expert, `[rows, width]`; or tokens, with `token_N`. Without it the
            result is the
                sum of all absolute weights, a float32 scalar.
            rows_per_expert_L: Rows of each expert, int64; rows after their sum are nobody's.
            token_N: The token of each row (looped experts only).
            weights_N: The weight of each row, float32, with `token_N`.

        Returns:
            `[rows, width]`, nobody's rows undefined; with `token_N` the weighted sums, `[tokens,
            width]`.
        """
        if x is None:
            return absolute_sum(self.w1, self.w2, self.w3)
        assert rows_per_expert_L is not None
        w1, w2, w3 = (weight.to(x.dtype) for weight in synchronize_grads(self.w1, self.w2, self.w3))
        if token_N is not None or self.looped(x, x.shape[0]):
            return loop_swiglu(x, rows_per_expert_L, w1, w2, w3, token_N, weights_N)
        return grouped_swiglu(x, rows_per_expert_L, w1, w2, w3)

    def looped(self, x: Tensor, rows: int) -> bool:
        """Whether `rows` rows of the type of `x` are computed expert by expert.

        So are none at all, which the grouped product refuses, and widths and types that it does not
        know.
        """
        if self.backend != "auto" or rows == 0:
            return self.backend == "loop" or rows == 0
        if x.is_cuda:
            return False
        num_experts, hidden, width = self._sizes
        known = x.dtype in (torch.float32, torch.bfloat16) and width % 8 == 0 and hidden % 8 == 0
        return not known or rows >= MANY_ROWS * num_experts


def synchronize_grads(*weights: Tensor) -> tuple[Tensor, ...]:
    """The weights as they are; their gradients come one after the other, the last first, however
    rows are computed.

    ZeRO stages 2 and 3 add up gradients over ranks in the order in which they come. A rank with no
    row, or on CPU with few, computes in another way than its peers, and without this its w1 would
    be added to their w2.
    """
    # Each view is a step of the backward pass of its own, and the later made one is gone back
    # through first.
    return _SynchronizeGrads.apply(*(weight.view_as(weight) for weight in weights))  # type: ignore[no-any-return]


class _SynchronizeGrads(torch.autograd.Function):
    """Waits for the gradients of all its inputs."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


def absolute_sum(*weights: Tensor) -> Tensor:
    """Sum of all absolute values, float32 scalar."""
    return torch.stack([weight.float().abs().sum() for weight in weights]).sum()


def grouped_swiglu(
    rows_ND: Tensor, rows_per_expert_L: Tensor, w1: Tensor, w2: Tensor, w3: Tensor
) -> Tensor:
    """All experts in three grouped matrix products.

    In bfloat16 on GPUs of compute capability 9.0 and 10.0 (H100, H200, B200) the sizes stay on the
    device. For all else, such as float32 on any GPU and bfloat16 on an A100, torch copies the
    offsets to the host and multiplies expert by expert (`_grouped_mm_fallback` in ATen's
    `GroupedMMUtils.h`), so the host waits in every product.

    Rows past the last offset, nobody's, are uninitialized memory, in the result and in the
    gradient: mask both (`pretrain.moe.dispatch.keep_first`).
    """
    ends_L = rows_per_expert_L.cumsum(0).to(torch.int32)
    gate_NF = F.grouped_mm(rows_ND, w1.transpose(-2, -1), offs=ends_L)
    up_NF = F.grouped_mm(rows_ND, w3.transpose(-2, -1), offs=ends_L)
    return F.grouped_mm(F.silu(gate_NF) * up_NF, w2.transpose(-2, -1), offs=ends_L)
