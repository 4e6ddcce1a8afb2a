"""Autograd-aware collectives on tensor rows: all-gather and all-to-all.

Every rank of the group must call each function in the same order, including ranks with zero rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather_rows(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Concatenate equally shaped tensors of all ranks along dim 0, differentiably.

    The backward pass is a reduce-scatter: a rank's rows receive the *sum* of their gradients over
    the losses of all ranks.
    """
    return _AllGatherRows.apply(x, group)  # type: ignore[no-any-return]


def all_to_all_rows(
    x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    """Send `send[r]` rows to each rank r of the group and receive `receive[r]` rows from it.

    Counts may be zero. The backward pass is the reverse all-to-all.
    """
    return _AllToAllRows.apply(x, send, receive, group)  # type: ignore[no-any-return]


class AsyncAllToAll:
    """`all_to_all_rows` split into `start` and `finish`, to overlap communication with computation.

    Example:
        exchange = AsyncAllToAll(send, receive, group)
        pending = exchange.start(x)
        y = compute(z)  # overlaps with the all-to-all, in the forward and the backward pass
        received = exchange.finish(pending)
    """

    def __init__(
        self, send: list[int], receive: list[int], group: dist.ProcessGroup | None
    ) -> None:
        self.send, self.receive, self.group = send, receive, group
        self._work: Any = None
        self._buffers: tuple[Tensor, Tensor] | None = None

    def start(self, x: Tensor) -> Tensor:
        """Start the all-to-all; pass the result to `finish` and use it nowhere else."""
        return _Start.apply(x, self)  # type: ignore[no-any-return]

    def finish(self, pending: Tensor) -> Tensor:
        """Wait for the received rows."""
        return _Finish.apply(pending, self)  # type: ignore[no-any-return]

    def launch(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Launch the all-to-all; the returned buffer is only valid after `wait`."""
        x = x.contiguous()
        out = x.new_empty(sum(receive), x.shape[1])
        self._work = dist.all_to_all_single(out, x, receive, send, group=self.group, async_op=True)
        self._buffers = x, out  # keeps the send buffer alive until the operation completes
        return out

    def wait(self) -> Tensor:
        """Wait for completion and return the received rows."""
        assert self._buffers is not None
        self._work.wait()
        _, out = self._buffers
        self._work = self._buffers = None
        return out


class _Start(torch.autograd.Function):
    """Forward: launch the all-to-all. Backward: wait for the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: AsyncAllToAll) -> Tensor:
        ctx.exchange = exchange
        return exchange.launch(x, exchange.send, exchange.receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait(), None


class _Finish(torch.autograd.Function):
    """Forward: wait for the rows. Backward: launch the all-to-all of their gradients.

    Autograd runs nodes in reverse order of creation, so the backward of everything computed between
    `_Start` and `_Finish` runs while the gradients are in flight.
    """

    @staticmethod
    def forward(ctx: Any, pending: Tensor, exchange: AsyncAllToAll) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return pending.view_as(pending)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.launch(grad, ctx.exchange.receive, ctx.exchange.send)
        # The gradient with respect to the sent rows has another number of rows than `pending`, so
        # it cannot be returned here: `_Start.backward` fetches it from the exchange.
        return grad, None


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.num_rows = group, x.shape[0]
        out = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_empty(ctx.num_rows, *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = x.new_empty(sum(receive), x.shape[1])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out = grad.new_empty(sum(ctx.send), grad.shape[1])
        dist.all_to_all_single(out, grad.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return out, None, None, None
