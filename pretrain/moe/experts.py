"""The experts of a layer: SwiGLU networks whose weights are stacked in three tensors.

Two ways to compute the same thing: `loop` (one expert after the other; the reference, and the faster
one on CPU) and `grouped` (one grouped matrix product; what a GPU wants).

Shapes: N rows, D trunk width, F expert width, L local experts.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Backend = Literal["auto", "grouped", "loop"]


class StackedExperts(nn.Module):
    """`num_experts` SwiGLU networks; rows come sorted by expert."""

    def __init__(self, width: int, expert_width: int, num_experts: int, backend: Backend = "auto") -> None:
        super().__init__()
        # Linear's layout [out, in]; the names w1 (gate), w2 (down), w3 (up) are the ones that
        # DeepSpeed's expert checkpoints know.
        self.w1 = nn.Parameter(torch.empty(num_experts, expert_width, width))
        self.w2 = nn.Parameter(torch.empty(num_experts, width, expert_width))
        self.w3 = nn.Parameter(torch.empty(num_experts, expert_width, width))
        self.backend = backend

    def forward(self, rows_ND: Tensor, rows_per_expert_L: Tensor) -> Tensor:
        """Apply expert l to its rows.

        Args:
            rows_ND: Rows grouped by expert, `[rows, width]`.
            rows_per_expert_L: Rows of each expert, int64; they sum to the number of rows.
        """
        dtype = rows_ND.dtype
        w1, w2, w3 = self.w1.to(dtype), self.w2.to(dtype), self.w3.to(dtype)
        if use_grouped(self.backend, rows_ND):
            return grouped_swiglu(rows_ND, rows_per_expert_L, w1, w2, w3)
        return loop_swiglu(rows_ND, rows_per_expert_L, w1, w2, w3)


def use_grouped(backend: Backend, rows_ND: Tensor) -> bool:
    """Whether the grouped product serves these rows; without any row the loop does."""
    if rows_ND.shape[0] == 0:
        return False
    return backend == "grouped" or (backend == "auto" and rows_ND.is_cuda)


def loop_swiglu(rows_ND: Tensor, rows_per_expert_L: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """One expert after the other. `unbind` keeps the gradient of the stack one tensor."""
    pieces = rows_ND.split(rows_per_expert_L.tolist())
    experts = zip(pieces, w1.unbind(0), w2.unbind(0), w3.unbind(0), strict=True)
    return torch.cat([F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
                      for x, gate, down, up in experts])


def grouped_swiglu(rows_ND: Tensor, rows_per_expert_L: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """All experts in three grouped matrix products, without asking the host for the sizes.

    Rows past the last offset would be uninitialised memory; the offsets end at the number of rows.
    """
    ends_L = rows_per_expert_L.cumsum(0).to(torch.int32)
    gate_NF = F.grouped_mm(rows_ND, w1.transpose(-2, -1), offs=ends_L)
    up_NF = F.grouped_mm(rows_ND, w3.transpose(-2, -1), offs=ends_L)
    return F.grouped_mm(F.silu(gate_NF) * up_NF, w2.transpose(-2, -1), offs=ends_L)
