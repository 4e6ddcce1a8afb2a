"""Communication with gradients. The only file besides the engines that talks to torch.distributed.

Every function is called by every rank, in the same order, also by one that has nothing to send.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Concatenate the equally shaped tensors of all ranks along dim 0; gradients flow back to their
    owners.

    The gradient that a rank receives for its own rows is the *sum* over the ranks of what each
    one's loss has to say about them.
    """
    return _GatherRows.apply(x, group)  # type: ignore[no-any-return]


def exchange_rows(
    x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    """Send `send[r]` rows to each rank r of the group and receive `receive[r]` rows from it.

    Zero rows are fine. The backward pass sends the gradients the other way.
    """
    return _ExchangeRows.apply(x, send, receive, group)  # type: ignore[no-any-return]


class Exchange:
    """`exchange_rows` in two halves, so that something else can be computed while the rows travel.

    exchange = Exchange(send, receive, group)
    travelling = exchange.start(x)
    ...                                 # computed meanwhile, and so is its gradient in the backward pass
    arrived = exchange.finish(travelling)
    """

    def __init__(
        self, send: list[int], receive: list[int], group: dist.ProcessGroup | None
    ) -> None:
        self.send, self.receive, self.group = send, receive, group
        self._work: Any = None
        self._rows: tuple[Tensor, Tensor] | None = None

    def start(self, x: Tensor) -> Tensor:
        """Let the rows go; what is returned must go to `finish` and nowhere else."""
        return _Start.apply(x, self)  # type: ignore[no-any-return]

    def finish(self, travelling: Tensor) -> Tensor:
        """Wait for the rows."""
        return _Finish.apply(travelling, self)  # type: ignore[no-any-return]

    def launch(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """The rows to come; not there before `wait`."""
        x = x.contiguous()
        out = x.new_empty(sum(receive), x.shape[1])
        self._work = dist.all_to_all_single(out, x, receive, send, group=self.group, async_op=True)
        self._rows = x, out  # what is sent must live as long as it is read
        return out

    def wait(self) -> Tensor:
        """The rows that came."""
        assert self._rows is not None
        self._work.wait()
        _, out = self._rows
        self._work = self._rows = None
        return out


class _Start(torch.autograd.Function):
    """Forward: rows leave. Backward: their gradients have arrived."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.launch(x, exchange.send, exchange.receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait(), None


class _Finish(torch.autograd.Function):
    """Forward: rows have arrived. Backward: their gradients leave.

    Autograd goes back through whatever was computed in between before it comes to `_Start`: later
    computed, earlier gone back through.
    """

    @staticmethod
    def forward(ctx: Any, travelling: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return travelling.view_as(travelling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.launch(grad, ctx.exchange.receive, ctx.exchange.send)
        # What comes back has as many rows as were sent, not as arrived, so it goes round autograd
        # to `_Start`.
        return grad, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.rows = group, x.shape[0]
        out = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_empty(ctx.rows, *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None


class _ExchangeRows(torch.autograd.Function):
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
