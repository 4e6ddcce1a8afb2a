"""A rank of `pretrain.parity` that injects a fault into the training of each case.

The environment variable FAULTS is a JSON list with a name of `FAULTS` for each case, or an empty
string for no fault. The reference in one process is not affected. Started by
tests/distributed/test_fault_injection.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from pretrain.parity import worker
from tests.support import loss_faults, routing_faults, update_faults

FAULTS: dict[str, Callable[[], list[Any]]] = {
    fault.__name__: fault
    for fault in (
        update_faults.expert_gradients_scaled_by_expert_parallel_size,
        update_faults.clip_by_mean_of_local_norms,
        update_faults.expert_weight_not_tagged,
        update_faults.expert_gradient_averaged_over_ranks,
        update_faults.perturbed_weights_on_last_rank,
        update_faults.scaled_gradients_on_last_rank,
        update_faults.learning_rate_never_updated,
        update_faults.earlier_micro_batches_dropped,
        update_faults.missing_expert_gradients_of_last_rank,
        update_faults.gradients_accumulated_in_bfloat16,
        loss_faults.auxiliary_terms_averaged_over_ranks,
        loss_faults.statistics_counted_in_recomputation,
        loss_faults.padding_counted_as_tokens,
        loss_faults.caption_loss_mean_of_means,
        loss_faults.negatives_from_local_rank_only,
        loss_faults.duplicate_captions_of_other_ranks_unmasked,
        loss_faults.router_bias_from_local_load,
        routing_faults.expert_outputs_swapped,
        routing_faults.router_in_bfloat16,
        routing_faults.routing_noise_seeded_by_rank,
        routing_faults.capacity_groups_shifted_by_missing_pairs,
        routing_faults.negated_router_logits,
        routing_faults.one_rank_hangs,
        routing_faults.one_rank_raises,
    )
}
"""Functions that return the patches of a fault, by name."""


@contextmanager
def injected(name: str) -> Iterator[None]:
    """Apply the patches of a fault; no patches if `name` is empty."""
    with ExitStack() as stack:
        for patch in FAULTS[name]() if name else ():
            stack.enter_context(patch)
        yield


def main() -> None:
    """Run the worker of `pretrain.parity` with the faults."""
    faults, current_case = json.loads(os.environ["FAULTS"]), [0]
    trace_case, compare = worker.trace_case, worker.RankWorker.compare

    def trace_with_fault(*args: Any) -> Any:
        with injected(faults[current_case[0]]):
            return trace_case(*args)

    def compare_and_record_index(self: Any, index: int) -> Any:
        current_case[0] = index
        return compare(self, index)

    worker.trace_case = trace_with_fault
    worker.RankWorker.compare = compare_and_record_index  # type: ignore[method-assign]
    worker.main()


if __name__ == "__main__":
    main()
