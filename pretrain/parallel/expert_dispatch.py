"""Tokens to experts on other ranks and back: uneven all-to-all inside the expert-parallel group.

Rows leave sorted by global expert, so they are sorted by owning rank too. The counts travel first; then the
rows, which arrive sorted by (sender, expert) and are put in the order (expert, sender) for the experts.

Shapes: N rows, D trunk width, E experts, L local experts, R ranks of the group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.moe.dispatch import Dispatched, sort_by_expert, spread, weighted_sum
from pretrain.moe.routing import Routing
from pretrain.parallel.collectives import exchange_rows


class _RouteHome(NamedTuple):
    """What the way back needs."""

    sent: list[int]
    received: list[int]
    by_sender_N: Tensor
    """Puts the experts' rows back in the order (sender, expert)."""
    by_expert_N: Tensor
    """The inverse of `by_sender_N`."""


class ExpertParallelDispatcher:
    """Experts are split over the ranks of `group`; every rank enters every exchange, even with no row."""

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = None

    def send(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        order_N, inverse_N = sort_by_expert(routing.expert_ids_TK)
        rows_ND = spread(x_TD, order_N, inverse_N, routing.expert_ids_TK.shape[1])
        counts_RL = routing.tokens_per_expert_E.view(dist.get_world_size(self.group), -1)
        arriving_RL = torch.empty_like(counts_RL)
        dist.all_to_all_single(arriving_RL, counts_RL.contiguous(), group=self.group)
        # One stop of the host per layer: the exchange needs the sizes as numbers.
        sizes = torch.stack([counts_RL.sum(dim=1), arriving_RL.sum(dim=1)]).tolist()
        sent, received = sizes[0], sizes[1]
        arrived_ND = exchange_rows(rows_ND, sent, received, self.group)
        by_expert_N, by_sender_N = _expert_order(arriving_RL, sum(received))
        home = _RouteHome(sent, received, by_sender_N, by_expert_N)
        local_ND = _permute(arrived_ND, by_expert_N, by_sender_N)
        return Dispatched(local_ND, arriving_RL.sum(dim=0), order_N, inverse_N, home)

    def combine(self, y_ND: Tensor, sent: Dispatched, routing: Routing) -> Tensor:
        home: _RouteHome = sent.route_home
        departing_ND = _permute(y_ND, home.by_sender_N, home.by_expert_N)
        returned_ND = exchange_rows(departing_ND, home.received, home.sent, self.group)
        return weighted_sum(returned_ND, sent, routing)


def _expert_order(arriving_RL: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Order that turns (sender, expert) into (expert, sender), and its inverse, for rows counted by both."""
    num_local = arriving_RL.shape[1]
    experts = torch.arange(num_local, device=arriving_RL.device).repeat(arriving_RL.shape[0])
    expert_N = experts.repeat_interleave(arriving_RL.flatten(), output_size=num_rows)
    by_expert_N = expert_N.argsort(stable=True)
    by_sender_N = torch.empty_like(by_expert_N)
    by_sender_N[by_expert_N] = torch.arange(num_rows, device=by_expert_N.device)
    return by_expert_N, by_sender_N


def _permute(x_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
    """Rows in `order_N`; a gather both ways."""
    return spread(x_ND, order_N, inverse_N, 1)
