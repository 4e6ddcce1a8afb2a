"""How tokens reach their experts and come back.

The layer asks a `Dispatcher`. `LocalDispatcher` (every expert lives here) is complete and is the
reference for the expert-parallel one in `pretrain.parallel.expert_dispatch`.

Both directions are gathers: a scatter-add would be slower on CPU and not deterministic on GPU.

Shapes: T tokens, K experts per token, N = T x K token choices ("rows"), D trunk width, L local experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pretrain.moe.routing import Routing


class Dispatched(NamedTuple):
    """Rows sorted by expert, and what is needed to bring them home."""

    rows_ND: Tensor
    """The rows that the local experts work on, grouped by local expert."""
    rows_per_expert_L: Tensor
    """How many rows each local expert got, int64."""
    order_N: Tensor
    """`order_N[i]` is the token choice (token x K + k) that stands at row i after sorting by expert."""
    inverse_N: Tensor
    """The row of each token choice: the inverse of `order_N`."""
    route_home: Any = None
    """What the dispatcher itself must remember (message sizes of an all-to-all)."""


class Dispatcher(Protocol):
    """Brings each token to its experts and the results back."""

    def send(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Return the rows of the local experts for tokens `[tokens, width]`."""
        ...

    def combine(self, y_ND: Tensor, sent: Dispatched, routing: Routing) -> Tensor:
        """Return `[tokens, width]`: the weighted sum of what each token's experts answered."""
        ...


class LocalDispatcher:
    """All experts live here: sort the token choices by expert, and undo it."""

    def send(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        order_N, inverse_N = sort_by_expert(routing.expert_ids_TK)
        rows_ND = spread(x_TD, order_N, inverse_N, routing.expert_ids_TK.shape[1])
        return Dispatched(rows_ND, routing.tokens_per_expert_E, order_N, inverse_N)

    def combine(self, y_ND: Tensor, sent: Dispatched, routing: Routing) -> Tensor:
        return weighted_sum(y_ND, sent, routing)


def sort_by_expert(expert_ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stable order of token choices by expert, and its inverse; int64 `[tokens x K]`."""
    order_N = expert_ids_TK.flatten().argsort(stable=True)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return order_N, inverse_N


def spread(x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, k: int) -> Tensor:
    """Copy each token to its `k` rows, in the order of the experts: `[tokens x k, width]`."""
    return _Spread.apply(x_TD, order_N, inverse_N, k)  # type: ignore[no-any-return]


def weighted_sum(y_ND: Tensor, sent: Dispatched, routing: Routing) -> Tensor:
    """Bring rows back to token order and add up each token's answers: `[tokens, width]`."""
    return _WeightedSum.apply(y_ND, routing.weights_TK, sent.order_N, sent.inverse_N)  # type: ignore[no-any-return]


class _Spread(torch.autograd.Function):
    """Rows = tokens repeated and permuted; the gradient of a token is the sum over its rows."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.k = k
        return x_TD.index_select(0, torch.div(order_N, k, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_N,) = ctx.saved_tensors
        rows, width = grad_ND.shape
        grad_TKD = grad_ND.index_select(0, inverse_N).view(rows // ctx.k, ctx.k, width)
        return grad_TKD.sum(dim=1), None, None, None


class _WeightedSum(torch.autograd.Function):
    """y_T = sum_k w_TK y[inverse]; written out because both gradients are gathers and row sums."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        tokens, k = weights_TK.shape
        y_TKD = y_ND.index_select(0, inverse_N).view(tokens, k, y_ND.shape[1])
        ctx.save_for_backward(y_TKD, weights_TK, order_N)
        return torch.bmm(weights_TK.to(y_ND.dtype).unsqueeze(1), y_TKD).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_TKD, weights_TK, order_N = ctx.saved_tensors
        k = weights_TK.shape[1]
        grad_weights_TK = torch.bmm(y_TKD, grad_TD.unsqueeze(2)).squeeze(2).to(weights_TK.dtype)
        rows_ND = grad_TD.index_select(0, torch.div(order_N, k, rounding_mode="floor"))
        row_weights_N = weights_TK.flatten().index_select(0, order_N).to(rows_ND.dtype)
        return rows_ND * row_weights_N.unsqueeze(1), grad_weights_TK, None, None
