"""A rank of `pretrain.check` in which cells are trained with a fault: `FAULTS` names one for each
case.

The faults are those that training on many ranks is known for. Each changes how a cell is trained
and leaves the reference, which the same process may train, as it is. Started by
test_planted_faults.py.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pretrain.check import worker
from pretrain.losses.total import MainTerms
from pretrain.model.vision_language import VisionLanguageModel
from pretrain.moe.auxiliary import Linearized
from pretrain.moe.layer import MoELayer, Router
from pretrain.moe.routing import gate_scores
from pretrain.moe.statistics import RouterStats
from pretrain.optim.groups import is_expert
from pretrain.parallel import deepspeed_engine, deepspeed_moe, expert_dispatch
from pretrain.train import step as train_step

Patch = Any


def expert_gradients_times_ranks() -> list[Patch]:
    """Every rank's gradient of an expert already holds all ranks' tokens, and is multiplied once
    more."""
    build = worker.build_engine

    def built(*args: Any) -> Any:
        engine = build(*args)
        for name, parameter in engine.model.named_parameters():
            if is_expert(name):
                parameter.register_hook(
                    lambda gradient: gradient * engine.layout.expert_parallel_size
                )
        return engine

    return [mock.patch.object(worker, "build_engine", built)]


def auxiliary_share_averaged() -> list[Patch]:
    """The routers' terms are divided by the ranks once too often."""
    share = Linearized.share
    return [
        mock.patch.object(
            Linearized, "share", lambda self, mine: share(self, mine) / dist.get_world_size()
        )
    ]


def statistics_of_both_computations() -> list[Patch]:
    """Statistics are added up wherever a block runs, also when its activations are computed
    again."""
    run = VisionLanguageModel._run

    def run_and_count(self: Any, block: Any, x_TD: Tensor, layout: Any) -> Any:
        y_TD, stats = run(self, block, x_TD, layout)
        if stats is not None and self.config.activation_checkpointing and torch.is_grad_enabled():
            stats = RouterStats(*(2 * field for field in stats))
        return y_TD, stats

    return [mock.patch.object(VisionLanguageModel, "_run", run_and_count)]


def padding_counted() -> list[Patch]:
    """Padding is a token with logits of zero."""
    sums = MoELayer._statistics

    def sums_with_padding(
        self: Any, logits_TE: Tensor, scored: Any, routing: Any, tokens: Any
    ) -> RouterStats:
        stats = sums(self, logits_TE, scored, routing, tokens)
        padding = tokens.num_pairs * tokens.context_length - len(tokens.text_positions)
        probability_ME = torch.zeros_like(stats.prob_sum_ME)
        probability_ME[1] = padding / self.config.num_experts
        chosen_ME = torch.zeros_like(stats.choices_ME)
        chosen_ME[1, : self.config.top_k] = padding
        return stats._replace(
            prob_sum_ME=stats.prob_sum_ME + probability_ME, choices_ME=stats.choices_ME + chosen_ME
        )

    return [mock.patch.object(MoELayer, "_statistics", sums_with_padding)]


def mean_of_norms() -> list[Patch]:
    """Gradients are clipped by the average of the ranks' own norms."""

    def clip(self: Any) -> float:
        mine = [
            parameter.grad for parameter in self.model.parameters() if parameter.grad is not None
        ]
        norm = torch.stack([gradient.float().square().sum() for gradient in mine]).sum().sqrt()
        dist.all_reduce(norm)
        mean = float(norm) / self.world_size
        if mean > self._clip_norm:
            torch._foreach_mul_(mine, self._clip_norm / (mean + 1e-6))
        return mean

    return [mock.patch.object(deepspeed_engine.DeepSpeedEngine, "_clip_whole_gradients", clip)]


def untagged_expert_weight() -> list[Patch]:
    """One weight of the experts does not say that ranks hold different ones, so all get rank 0's at
    the start."""
    tag = deepspeed_moe.DeepSpeedMoELayer._tag_expert

    def tag_others(self: Any, parameter: Any) -> None:
        if parameter is not self.experts.w2 or self.block != 1:
            tag(self, parameter)

    return [mock.patch.object(deepspeed_moe.DeepSpeedMoELayer, "_tag_expert", tag_others)]


def drifted_rank() -> list[Patch]:
    """The last rank begins with slightly other weights."""
    build = worker.build_engine

    def built(*args: Any) -> Any:
        engine = build(*args)
        if engine.rank == engine.world_size - 1:
            engine.model.get_parameter("caption_norm.weight").data.mul_(1 + 1e-6)
        return engine

    return [mock.patch.object(worker, "build_engine", built)]


def gradients_of_the_last_rank() -> list[Patch]:
    """Only the last rank's experts get too large a gradient."""
    build = worker.build_engine

    def built(*args: Any) -> Any:
        engine = build(*args)
        if engine.rank == engine.world_size - 1:
            engine.model.get_parameter("blocks.2.ffn.experts.w3").register_hook(
                lambda gradient: gradient * 1.001
            )
        return engine

    return [mock.patch.object(worker, "build_engine", built)]


def expert_weight_averaged() -> list[Patch]:
    """The gradient of one weight of the experts is averaged over ranks that hold different ones."""
    build = worker.build_engine

    def built(*args: Any) -> Any:
        engine = build(*args)
        engine.model.get_parameter("blocks.1.ffn.experts.w2").allreduce = True
        return engine

    return [mock.patch.object(worker, "build_engine", built)]


def mean_of_means() -> list[Patch]:
    """Captioning is the mean over ranks of each one's mean over its tokens."""
    sums, tokens = train_step.global_sums, []

    def remember(engine: Any, outputs: Any) -> Any:
        tokens[:] = [sum(int(output.caption_tokens) for output in outputs)]
        return sums(engine, outputs)

    def terms(*, contrastive: Tensor, caption_loss_sum: Tensor, sums: Any) -> MainTerms:
        return MainTerms(contrastive, caption_loss_sum / max(1, tokens[0]) / dist.get_world_size())

    return [
        mock.patch.object(train_step, "global_sums", remember),
        mock.patch.object(train_step, "main_terms", terms),
    ]


def local_negatives() -> list[Patch]:
    """A pair is contrasted only with those of its own rank."""
    share = train_step.info_nce_share

    def local_share(*args: Any, valid_G: Tensor, first_row: int, **others: Any) -> Tensor:
        rows = len(valid_G) // dist.get_world_size()
        mine_G = torch.zeros_like(valid_G)
        mine_G[first_row : first_row + rows] = True
        return share(*args, valid_G=valid_G & mine_G, first_row=first_row, **others)

    return [mock.patch.object(train_step, "info_nce_share", local_share)]


def equal_captions_of_other_ranks() -> list[Patch]:
    """Pairs of other ranks with the same caption are used as negatives."""
    share = train_step.info_nce_share

    def partly_masked(*args: Any, all_hashes_G: Tensor, first_row: int, **others: Any) -> Tensor:
        rows = len(all_hashes_G) // dist.get_world_size()
        hashes_G = torch.full_like(all_hashes_G, -1)
        hashes_G[first_row : first_row + rows] = all_hashes_G[first_row : first_row + rows]
        return share(*args, all_hashes_G=hashes_G, first_row=first_row, **others)

    return [mock.patch.object(train_step, "info_nce_share", partly_masked)]


def biases_by_local_load() -> list[Patch]:
    """Each rank moves its biases by what its own tokens chose."""
    sums, move, mine = train_step.global_sums, VisionLanguageModel.move_biases, []

    def remember(engine: Any, outputs: Any) -> Any:
        mine[:] = [torch.stack([output.router.choices_ME for output in outputs]).sum(dim=0)]
        return sums(engine, outputs)

    return [
        mock.patch.object(train_step, "global_sums", remember),
        mock.patch.object(
            VisionLanguageModel, "move_biases", lambda self, _all, rate: move(self, mine[0], rate)
        ),
    ]


def rows_return_in_wrong_order() -> list[Patch]:
    """What comes back from one expert goes to the wrong tokens."""
    exchange = expert_dispatch.exchange_rows

    def exchange_and_swap(x: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        rows = exchange(x, send, receive, group)
        order = list(range(len(rows)))
        order[:2] = order[:2][::-1]  # rows are sorted by expert
        return rows.index_select(0, torch.tensor(order, dtype=torch.int64))

    return [mock.patch.object(expert_dispatch, "exchange_rows", exchange_and_swap)]


def router_in_bfloat16() -> list[Patch]:
    """Logits are computed in the format of the activations of mixed precision."""
    forward = Router.forward

    def rounded(self: Any, x_TD: Tensor | None = None) -> Tensor:
        return (
            forward(self)
            if x_TD is None
            else F.linear(x_TD.bfloat16(), self.weight.bfloat16()).float()
        )

    return [mock.patch.object(Router, "forward", rounded)]


def noise_by_rank() -> list[Patch]:
    """What routing draws depends on the rank, as with a generator of its own."""
    draw = train_step.step_draw
    return [
        mock.patch.object(
            train_step, "step_draw", lambda seed, step: draw(seed + dist.get_rank(), step)
        )
    ]


def missing_pairs_shift_groups() -> list[Patch]:
    """Capacity groups are made of the pairs that are there, and not of the rows that were asked
    for."""
    facts = deepspeed_engine.routing_facts

    def of_present(batch: Any, *others: Any) -> Any:
        return facts(batch._replace(slots=torch.arange(len(batch.slots))), *others)

    return [mock.patch.object(deepspeed_engine, "routing_facts", of_present)]


def rate_does_not_arrive() -> list[Patch]:
    """The optimizer keeps the learning rate that it was made with."""
    take = deepspeed_engine.DeepSpeedEngine.step

    def step(self: Any, learning_rate: float) -> float:
        return take(self, self._engine.optimizer.param_groups[0]["lr"])

    return [mock.patch.object(deepspeed_engine.DeepSpeedEngine, "step", step)]


def last_micro_batch_alone() -> list[Patch]:
    """Gradients of earlier micro-batches are forgotten."""
    backward = deepspeed_engine.DeepSpeedEngine.backward

    def forgetful(self: Any, loss: Tensor, *, last: bool) -> None:
        backward(self, loss if last else 0.0 * loss, last=last)

    return [mock.patch.object(deepspeed_engine.DeepSpeedEngine, "backward", forgetful)]


def experts_of_the_last_rank_untold() -> list[Patch]:
    """No gradient of the last rank's experts can be had, as when they got none."""
    gradients = deepspeed_engine.DeepSpeedEngine.gradients

    def others(self: Any) -> Any:
        found = gradients(self)
        return {
            name: g
            for name, g in found.items()
            if not (self.rank == self.world_size - 1 and ".experts." in name)
        }

    return [mock.patch.object(deepspeed_engine.DeepSpeedEngine, "gradients", others)]


def negative_sign_of_score() -> list[Patch]:
    """One rank judges by other scores: a rank whose code or weights are stale."""
    scores = gate_scores

    def stale(logits_TE: Tensor, score: Any) -> Tensor:
        return scores(-logits_TE if dist.get_rank() == 1 else logits_TE, score)

    return [mock.patch("pretrain.moe.routing.gate_scores", stale)]


def hang() -> list[Patch]:
    """One rank never comes to the exchange."""
    dispatch = expert_dispatch.ExpertParallelDispatcher.run

    def stuck(self: Any, *args: Any) -> Any:
        if dist.get_rank() == 1:
            time.sleep(3600)
        return dispatch(self, *args)

    return [mock.patch.object(expert_dispatch.ExpertParallelDispatcher, "run", stuck)]


def failure() -> list[Patch]:
    """One rank fails, and the others wait for it."""

    def fail(*args: Any) -> Any:
        if dist.get_rank() == 1:
            raise RuntimeError("the sky falls")
        return facts(*args)

    facts = deepspeed_engine.routing_facts
    return [mock.patch.object(deepspeed_engine, "routing_facts", fail)]


FAULTS: dict[str, Callable[[], list[Patch]]] = {
    fault.__name__: fault
    for fault in (
        expert_gradients_times_ranks,
        auxiliary_share_averaged,
        statistics_of_both_computations,
        padding_counted,
        mean_of_norms,
        untagged_expert_weight,
        expert_weight_averaged,
        mean_of_means,
        local_negatives,
        equal_captions_of_other_ranks,
        biases_by_local_load,
        rows_return_in_wrong_order,
        router_in_bfloat16,
        noise_by_rank,
        missing_pairs_shift_groups,
        rate_does_not_arrive,
        last_micro_batch_alone,
        negative_sign_of_score,
        experts_of_the_last_rank_untold,
        drifted_rank,
        gradients_of_the_last_rank,
        hang,
        failure,
    )
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Train with a fault; with none when the name is empty."""
    with ExitStack() as stack:
        for patch in FAULTS[name]() if name else ():
            stack.enter_context(patch)
        yield


def main() -> None:
    """The worker, its cells trained with faults."""
    faults, current = json.loads(os.environ["FAULTS"]), [0]
    trace_cell, compare = worker.trace_cell, worker.Ranks._compare

    def trace_with_fault(*args: Any) -> Any:
        with planted(faults[current[0]]):
            return trace_cell(*args)

    def compare_with_number(self: Any, number: int, case: Any) -> Any:
        current[0] = number
        return compare(self, number, case)

    worker.trace_cell = trace_with_fault
    worker.Ranks._compare = compare_with_number  # type: ignore[method-assign]
    worker.main()


if __name__ == "__main__":
    main()
