"""How tokens reach their experts and come back.

The layer asks a `Dispatcher`. `LocalDispatcher` (every expert lives here) is complete and is the
reference for the expert-parallel one in `pretrain.parallel.expert_dispatch`.

Choices are sorted by expert; those that found no place come last, as rows that no expert computes.
Where every token has k choices, both directions are gathers: a scatter-add would not be
deterministic on GPU.

Shapes: T tokens, K experts per token, N choices ("rows"), D trunk width, L local experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pretrain.moe.experts import StackedExperts
from pretrain.moe.routing import Routing

Shared = Callable[[Tensor], Tensor]


class Dispatcher(Protocol):
    """Brings each token to its experts and the results back."""

    def run(
        self, x_TD: Tensor, routing: Routing, experts: StackedExperts, shared: Shared | None
    ) -> Tensor:
        """The weighted sum of what each token's experts answer, plus `shared(x_TD)`; `[tokens,
        width]`."""
        ...


class LocalDispatcher:
    """All experts live here."""

    def run(
        self, x_TD: Tensor, routing: Routing, experts: StackedExperts, shared: Shared | None
    ) -> Tensor:
        rows = sort_choices(routing)
        if experts.looped(x_TD, routing.expert_ids_N.shape[0]):
            y_TD: Tensor = experts(
                x_TD, routing.tokens_per_expert_E, rows.token_N, rows.weights(routing)
            )
        else:
            limited = routing.kept_ME is not routing.choices_ME
            x_ND = spread(x_TD, rows, routing.k)
            if limited:
                x_ND = keep_first(x_ND, routing.tokens_per_expert_E.sum())
            y_ND = experts(x_ND, routing.tokens_per_expert_E)
            if limited:
                y_ND = keep_first(y_ND, routing.tokens_per_expert_E.sum())
            y_TD = weighted_sum(y_ND, rows, routing, x_TD.shape[0])
        return y_TD if shared is None else y_TD + shared(x_TD)


class Rows(NamedTuple):
    """Choices in the order of their experts."""

    order_N: Tensor
    """`order_N[i]` is the choice that stands at row i."""
    token_N: Tensor
    """The token of row i."""

    def weights(self, routing: Routing) -> Tensor:
        """The gate weight of each row, with gradient."""
        return routing.weights_N.index_select(0, self.order_N)


def sort_choices(routing: Routing) -> Rows:
    """Sort stably by expert; int64 `[choices]`."""
    order_N = routing.expert_ids_N.argsort(stable=True)
    if routing.token_N is not None:
        return Rows(order_N, routing.token_N.index_select(0, order_N))
    return Rows(order_N, torch.div(order_N, routing.k, rounding_mode="floor"))


def inverse(order_N: Tensor) -> Tensor:
    """The permutation that undoes `order_N`."""
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return inverse_N


def spread(x_TD: Tensor, rows: Rows, k: int) -> Tensor:
    """Copy each token to its rows, `[rows, width]`."""
    if not k:
        return _Gather.apply(x_TD, rows.token_N)  # type: ignore[no-any-return]
    return _Spread.apply(x_TD, rows.token_N, rows.order_N, k)  # type: ignore[no-any-return]


def permute(x_ND: Tensor, order_N: Tensor) -> Tensor:
    """Rows in `order_N`, a permutation; a gather both ways."""
    return _Spread.apply(x_ND, order_N, order_N, 1)  # type: ignore[no-any-return]


def weighted_sum(y_ND: Tensor, rows: Rows, routing: Routing, num_tokens: int) -> Tensor:
    """Bring rows back to their tokens and add up each token's answers: `[tokens, width]`."""
    if not routing.k:
        weighted_ND = y_ND * rows.weights(routing).to(y_ND.dtype).unsqueeze(1)
        return add_rows(weighted_ND, rows.token_N, num_tokens)
    weights_TK = routing.weights_N.view(-1, routing.k)
    return _WeightedSum.apply(y_ND, weights_TK, rows.order_N)  # type: ignore[no-any-return]


def keep_first(x_ND: Tensor, count: Tensor) -> Tensor:
    """Zeros in the rows from `count` on, and in their gradient, whatever stands there: it may be no
    number."""
    kept_N1 = (torch.arange(x_ND.shape[0], device=x_ND.device) < count).unsqueeze(1)
    return torch.where(kept_N1, x_ND, x_ND.new_zeros(()))


def add_rows(x_ND: Tensor, token_N: Tensor, num_tokens: int) -> Tensor:
    """Sum the rows of each token, `[tokens, width]`, in the same order each time."""
    out_TD = x_ND.new_zeros(num_tokens, x_ND.shape[1])
    if x_ND.is_cuda:  # index_add would add in any order there; this one sorts first
        return out_TD.index_put((token_N,), x_ND, accumulate=True)
    return out_TD.index_add(0, token_N, x_ND)


class _Gather(torch.autograd.Function):
    """Rows of a tensor; the gradient of a token is the sum over its rows."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor) -> Tensor:
        ctx.save_for_backward(token_N)
        ctx.tokens = x_TD.shape[0]
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        (token_N,) = ctx.saved_tensors
        return add_rows(grad_ND, token_N, ctx.tokens), None


class _Spread(torch.autograd.Function):
    """The same with k rows of each token, so that the gradient is a gather and a sum over k."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, order_N: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order_N)
        ctx.k = k
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None]:
        (order_N,) = ctx.saved_tensors
        rows, width = grad_ND.shape
        grad_TKD = grad_ND.index_select(0, inverse(order_N)).view(rows // ctx.k, ctx.k, width)
        return grad_TKD.squeeze(1) if ctx.k == 1 else grad_TKD.sum(dim=1), None, None, None


class _WeightedSum(torch.autograd.Function):
    """y_T = sum_k w_TK y[inverse]; written out because both gradients are gathers and row sums."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weights_TK: Tensor, order_N: Tensor) -> Tensor:
        tokens, k = weights_TK.shape
        y_TKD = y_ND.index_select(0, inverse(order_N)).view(tokens, k, y_ND.shape[1])
        ctx.save_for_backward(y_TKD, weights_TK, order_N)
        return torch.bmm(weights_TK.to(y_ND.dtype).unsqueeze(1), y_TKD).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_TKD, weights_TK, order_N = ctx.saved_tensors
        k = weights_TK.shape[1]
        grad_weights_TK = torch.bmm(y_TKD, grad_TD.unsqueeze(2)).squeeze(2).to(weights_TK.dtype)
        rows_ND = grad_TD.index_select(0, torch.div(order_N, k, rounding_mode="floor"))
        row_weights_N = weights_TK.flatten().index_select(0, order_N).to(rows_ND.dtype)
        return rows_ND * row_weights_N.unsqueeze(1), grad_weights_TK, None
