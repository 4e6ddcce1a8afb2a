"""Expert-parallel dispatch: uneven all-to-all inside the expert-parallel group.

Rows are sent sorted by global expert, and hence by owning rank. The counts are exchanged first,
then the rows. Received rows are sorted by (sender, expert) and permuted to (expert, sender) for the
experts. Assignments dropped by the capacity limit are not sent.

Shapes: T tokens, N rows (one per assignment), D trunk width, E experts, L local experts, R ranks of
the group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pretrain.moe.dispatch import (
    SharedExperts,
    gather_rows,
    inverse_permutation,
    permute_rows,
    sort_by_expert,
    weighted_sum,
)
from pretrain.moe.experts import StackedExperts
from pretrain.moe.routing import Routing
from pretrain.parallel.collectives import AsyncAllToAll, all_to_all_rows


class ExpertParallelDispatcher:
    """Dispatcher whose experts are split over the ranks of `group`.

    Every rank takes part in every all-to-all, even with zero rows.
    """

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = None

    def run(
        self, x_TD: Tensor, routing: Routing, experts: StackedExperts, shared: SharedExperts | None
    ) -> Tensor:
        """See `pretrain.moe.dispatch.Dispatcher.run`."""
        rows = sort_by_expert(routing)
        rows_ND = gather_rows(x_TD, rows, routing.k)
        send_counts_RL = routing.tokens_per_expert_E.view(dist.get_world_size(self.group), -1)
        receive_counts_RL = torch.empty_like(send_counts_RL)
        dist.all_to_all_single(receive_counts_RL, send_counts_RL.contiguous(), group=self.group)

        # The only host synchronization of the layer: all-to-all needs the split sizes on the host.
        sizes = torch.stack([send_counts_RL.sum(dim=1), receive_counts_RL.sum(dim=1)]).tolist()
        send, receive = sizes[0], sizes[1]
        num_dropped = rows_ND.shape[0] - sum(send)

        exchange = AsyncAllToAll(send, receive, self.group)
        pending_ND = exchange.start(rows_ND[: sum(send)])
        shared_TD = None if shared is None else shared(x_TD)  # overlaps with the all-to-all
        received_ND = exchange.finish(pending_ND)

        order_N = _expert_order(receive_counts_RL, sum(receive))
        y_ND = experts(permute_rows(received_ND, order_N), receive_counts_RL.sum(dim=0))
        results_ND = permute_rows(y_ND, inverse_permutation(order_N))
        returned_ND = all_to_all_rows(results_ND, receive, send, self.group)
        padded_ND = F.pad(returned_ND, (0, 0, 0, num_dropped))

        y_TD = weighted_sum(padded_ND, rows, routing, x_TD.shape[0])
        return y_TD if shared_TD is None else y_TD + shared_TD


def _expert_order(counts_RL: Tensor, num_rows: int) -> Tensor:
    """Permutation from (sender, expert) order to (expert, sender) order.

    Args:
        counts_RL: Rows by sending rank and local expert.
        num_rows: Their sum.
    """
    num_local = counts_RL.shape[1]
    experts = torch.arange(num_local, device=counts_RL.device).repeat(counts_RL.shape[0])
    expert_N = experts.repeat_interleave(counts_RL.flatten(), output_size=num_rows)
    return expert_N.argsort(stable=True)
