"""Tokens to experts on other ranks and back: uneven all-to-all inside the expert-parallel group.

Rows leave sorted by global expert, so they are sorted by owning rank too. The counts travel first;
then the rows, which arrive sorted by (sender, expert) and are put in the order (expert, sender) for
the experts. Choices that found no place do not travel.

Shapes: N rows, D trunk width, E experts, L local experts, R ranks of the group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pretrain.moe.dispatch import Shared, inverse, permute, sort_choices, spread, weighted_sum
from pretrain.moe.experts import StackedExperts
from pretrain.moe.routing import Routing
from pretrain.parallel.collectives import Exchange, exchange_rows


class ExpertParallelDispatcher:
    """Experts are split over the ranks of `group`; every rank enters every exchange, even with no
    row."""

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = None

    def run(
        self, x_TD: Tensor, routing: Routing, experts: StackedExperts, shared: Shared | None
    ) -> Tensor:
        rows = sort_choices(routing)
        rows_ND = spread(x_TD, rows, routing.k)
        counts_RL = routing.tokens_per_expert_E.view(dist.get_world_size(self.group), -1)
        arriving_RL = torch.empty_like(counts_RL)
        dist.all_to_all_single(arriving_RL, counts_RL.contiguous(), group=self.group)
        # One stop of the host per layer: the exchange needs the sizes as numbers.
        sizes = torch.stack([counts_RL.sum(dim=1), arriving_RL.sum(dim=1)]).tolist()
        sent, received = sizes[0], sizes[1]
        left_behind = rows_ND.shape[0] - sum(sent)
        exchange = Exchange(sent, received, self.group)
        travelling_ND = exchange.start(rows_ND[: sum(sent)])
        shared_TD = None if shared is None else shared(x_TD)  # while the rows travel
        arrived_ND = exchange.finish(travelling_ND)
        by_expert_N = _expert_order(arriving_RL, sum(received))
        y_ND = experts(permute(arrived_ND, by_expert_N), arriving_RL.sum(dim=0))
        departing_ND = permute(y_ND, inverse(by_expert_N))
        returned_ND = F.pad(
            exchange_rows(departing_ND, received, sent, self.group), (0, 0, 0, left_behind)
        )
        y_TD = weighted_sum(returned_ND, rows, routing, x_TD.shape[0])
        return y_TD if shared_TD is None else y_TD + shared_TD


def _expert_order(arriving_RL: Tensor, num_rows: int) -> Tensor:
    """Order that turns (sender, expert) into (expert, sender), for rows counted by both."""
    num_local = arriving_RL.shape[1]
    experts = torch.arange(num_local, device=arriving_RL.device).repeat(arriving_RL.shape[0])
    expert_N = experts.repeat_interleave(arriving_RL.flatten(), output_size=num_rows)
    return expert_N.argsort(stable=True)
