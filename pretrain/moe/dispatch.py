"""Dispatch of tokens to their experts and combination of the expert outputs.

A layer uses a `Dispatcher`. `LocalDispatcher` is for a process that holds all experts; it is also
the reference for the expert-parallel dispatcher in `pretrain.parallel.expert_dispatch`.

Assignments are sorted by expert. Dropped assignments come last, as rows that no expert processes.
If every token has k assignments, both directions are gathers: a scatter-add would not be
deterministic on GPU.

Shapes: T tokens, K experts per token, N assignments ("rows"), D trunk width, L local experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pretrain.moe.experts import StackedExperts
from pretrain.moe.routing import Routing

SharedExperts = Callable[[Tensor], Tensor]


class Dispatcher(Protocol):
    """Sends tokens to their experts and combines the results."""

    def run(
        self, x_TD: Tensor, routing: Routing, experts: StackedExperts, shared: SharedExperts | None
    ) -> Tensor:
        """The weighted sum of each token's expert outputs, plus `shared(x_TD)`; `[tokens,
        width]`."""
        ...


class LocalDispatcher:
    """Dispatcher for a process that holds all experts."""

    def run(
        self, x_TD: Tensor, routing: Routing, experts: StackedExperts, shared: SharedExperts | None
    ) -> Tensor:
        rows = sort_by_expert(routing)
        if experts.uses_loop(x_TD, routing.expert_ids_N.shape[0]):
            y_TD: Tensor = experts(
                x_TD, routing.tokens_per_expert_E, rows.token_N, rows.weights(routing)
            )
        else:
            has_capacity_limit = routing.kept_ME is not routing.assignments_ME
            x_ND = gather_rows(x_TD, rows, routing.k)
            if has_capacity_limit:
                x_ND = zero_rows_from(x_ND, routing.tokens_per_expert_E.sum())
            y_ND = experts(x_ND, routing.tokens_per_expert_E)
            if has_capacity_limit:
                y_ND = zero_rows_from(y_ND, routing.tokens_per_expert_E.sum())
            y_TD = weighted_sum(y_ND, rows, routing, x_TD.shape[0])
        return y_TD if shared is None else y_TD + shared(x_TD)


class SortedAssignments(NamedTuple):
    """Assignments sorted by expert."""

    order_N: Tensor
    """`order_N[i]` is the index of the assignment in row i."""
    token_N: Tensor
    """Token index of row i."""

    def weights(self, routing: Routing) -> Tensor:
        """Gate weight of each row, with gradient."""
        return routing.weights_N.index_select(0, self.order_N)


def sort_by_expert(routing: Routing) -> SortedAssignments:
    """Sort the assignments by expert, in stable order."""
    order_N = routing.expert_ids_N.argsort(stable=True)
    if routing.token_N is not None:
        return SortedAssignments(order_N, routing.token_N.index_select(0, order_N))
    return SortedAssignments(order_N, torch.div(order_N, routing.k, rounding_mode="floor"))


def inverse_permutation(order_N: Tensor) -> Tensor:
    """The permutation that undoes `order_N`."""
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return inverse_N


def gather_rows(x_TD: Tensor, rows: SortedAssignments, k: int) -> Tensor:
    """Copy each token to its rows, `[rows, width]`."""
    if not k:
        return _Gather.apply(x_TD, rows.token_N)  # type: ignore[no-any-return]
    return _GatherTopK.apply(x_TD, rows.token_N, rows.order_N, k)  # type: ignore[no-any-return]


def permute_rows(x_ND: Tensor, order_N: Tensor) -> Tensor:
    """Rows in the order of the permutation `order_N`; forward and backward are gathers."""
    return _GatherTopK.apply(x_ND, order_N, order_N, 1)  # type: ignore[no-any-return]


def weighted_sum(
    y_ND: Tensor, rows: SortedAssignments, routing: Routing, num_tokens: int
) -> Tensor:
    """Sum the weighted expert outputs of each token, `[tokens, width]`."""
    if not routing.k:
        weighted_ND = y_ND * rows.weights(routing).to(y_ND.dtype).unsqueeze(1)
        return add_rows(weighted_ND, rows.token_N, num_tokens)
    weights_TK = routing.weights_N.view(-1, routing.k)
    return _WeightedSum.apply(y_ND, weights_TK, rows.order_N)  # type: ignore[no-any-return]


def zero_rows_from(x_ND: Tensor, count: Tensor) -> Tensor:
    """Set the rows from `count` on to zero, in the result and in the gradient.

    Those rows may be uninitialized memory, NaN included, so they are replaced by `where`:
    multiplication by zero would keep NaN.
    """
    is_valid_N1 = (torch.arange(x_ND.shape[0], device=x_ND.device) < count).unsqueeze(1)
    return torch.where(is_valid_N1, x_ND, x_ND.new_zeros(()))


def add_rows(x_ND: Tensor, token_N: Tensor, num_tokens: int) -> Tensor:
    """Sum the rows of each token, `[tokens, width]`, in a deterministic order."""
    out_TD = x_ND.new_zeros(num_tokens, x_ND.shape[1])
    if x_ND.is_cuda:
        # `index_add` on GPU adds in arbitrary order; an accumulating `index_put` sorts first.
        return out_TD.index_put((token_N,), x_ND, accumulate=True)
    return out_TD.index_add(0, token_N, x_ND)


class _Gather(torch.autograd.Function):
    """Gather of token rows; the gradient of a token is the sum over its rows."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor) -> Tensor:
        ctx.save_for_backward(token_N)
        ctx.tokens = x_TD.shape[0]
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        (token_N,) = ctx.saved_tensors
        return add_rows(grad_ND, token_N, ctx.tokens), None


class _GatherTopK(torch.autograd.Function):
    """Gather with exactly k rows per token, so that the gradient is a gather and a sum over k."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, order_N: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order_N)
        ctx.k = k
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None]:
        (order_N,) = ctx.saved_tensors
        rows, width = grad_ND.shape
        unsorted_ND = grad_ND.index_select(0, inverse_permutation(order_N))
        grad_TKD = unsorted_ND.view(rows // ctx.k, ctx.k, width)
        return grad_TKD.squeeze(1) if ctx.k == 1 else grad_TKD.sum(dim=1), None, None, None


class _WeightedSum(torch.autograd.Function):
    """y_T = sum_k w_TK y[inverse]; a custom backward because both gradients are gathers and row
    sums."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weights_TK: Tensor, order_N: Tensor) -> Tensor:
        tokens, k = weights_TK.shape
        unsorted_ND = y_ND.index_select(0, inverse_permutation(order_N))
        y_TKD = unsorted_ND.view(tokens, k, y_ND.shape[1])
        ctx.save_for_backward(y_TKD, weights_TK, order_N)
        return torch.bmm(weights_TK.to(y_ND.dtype).unsqueeze(1), y_TKD).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_TKD, weights_TK, order_N = ctx.saved_tensors
        k = weights_TK.shape[1]
        grad_weights_TK = torch.bmm(y_TKD, grad_TD.unsqueeze(2)).squeeze(2).to(weights_TK.dtype)
        grad_rows_ND = grad_TD.index_select(0, torch.div(order_N, k, rounding_mode="floor"))
        row_weights_N = weights_TK.flatten().index_select(0, order_N).to(grad_rows_ND.dtype)
        return grad_rows_ND * row_weights_N.unsqueeze(1), grad_weights_TK, None
