"""Faults in losses and router statistics, injected by patching the training code."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.losses.contrastive import GatheredPairs
from pretrain.losses.objective import TaskLosses
from pretrain.model.vision_language import VisionLanguageModel
from pretrain.moe.auxiliary import LinearizedLosses
from pretrain.moe.layer import MoELayer
from pretrain.moe.statistics import RouterStats
from pretrain.train import step as train_step

Patch = Any


def auxiliary_terms_averaged_over_ranks() -> list[Patch]:
    """The auxiliary losses are divided by the number of ranks although their sum is global."""
    original = LinearizedLosses.local_term

    def averaged(self: Any, local_stats: RouterStats) -> Tensor:
        return original(self, local_stats) / dist.get_world_size()

    return [mock.patch.object(LinearizedLosses, "local_term", averaged)]


def statistics_counted_in_recomputation() -> list[Patch]:
    """Router statistics are counted again when activations are recomputed."""
    original = VisionLanguageModel._run

    def count_twice(self: Any, block: Any, x_TD: Tensor, layout: Any) -> Any:
        y_TD, stats = original(self, block, x_TD, layout)
        if stats is not None and self.config.activation_checkpointing and torch.is_grad_enabled():
            stats = RouterStats(*(2 * field for field in stats))
        return y_TD, stats

    return [mock.patch.object(VisionLanguageModel, "_run", count_twice)]


def padding_counted_as_tokens() -> list[Patch]:
    """Padding is counted as text tokens with logits of zero."""
    original = MoELayer._statistics

    def count_padding(
        self: Any, logits_TE: Tensor, scored: Any, routing: Any, tokens: Any
    ) -> RouterStats:
        stats = original(self, logits_TE, scored, routing, tokens)
        padding = tokens.num_pairs * tokens.context_length - len(tokens.text_positions)
        prob_sum_ME = torch.zeros_like(stats.prob_sum_ME)
        prob_sum_ME[1] = padding / self.config.num_experts
        assignments_ME = torch.zeros_like(stats.assignments_ME)
        assignments_ME[1, : self.config.top_k] = padding
        return stats._replace(
            prob_sum_ME=stats.prob_sum_ME + prob_sum_ME,
            assignments_ME=stats.assignments_ME + assignments_ME,
        )

    return [mock.patch.object(MoELayer, "_statistics", count_padding)]


def caption_loss_mean_of_means() -> list[Patch]:
    """The caption loss is the mean over ranks of the mean over local tokens."""
    original = train_step.global_sums
    local_tokens = [0]

    def record(engine: Any, outputs: Any) -> Any:
        local_tokens[0] = sum(int(output.caption_tokens) for output in outputs)
        return original(engine, outputs)

    def terms(*, contrastive: Tensor, caption_loss_sum: Tensor, sums: Any) -> TaskLosses:
        local_mean = caption_loss_sum / max(1, local_tokens[0])
        return TaskLosses(contrastive, local_mean / dist.get_world_size())

    return [
        mock.patch.object(train_step, "global_sums", record),
        mock.patch.object(train_step, "task_losses", terms),
    ]


def negatives_from_local_rank_only() -> list[Patch]:
    """The contrastive loss uses only negatives of the local rank."""
    original = train_step.local_info_nce

    def local_negatives(*args: Any, gathered: GatheredPairs, **kwargs: Any) -> Tensor:
        rows = len(gathered.valid_G) // dist.get_world_size()
        local_G = torch.zeros_like(gathered.valid_G)
        local_G[gathered.first_row : gathered.first_row + rows] = True
        gathered = gathered._replace(valid_G=gathered.valid_G & local_G)
        return original(*args, gathered=gathered, **kwargs)

    return [mock.patch.object(train_step, "local_info_nce", local_negatives)]


def duplicate_captions_of_other_ranks_unmasked() -> list[Patch]:
    """Pairs of other ranks with the same caption are used as negatives."""
    original = train_step.local_info_nce

    def partly_masked(*args: Any, gathered: GatheredPairs, **kwargs: Any) -> Tensor:
        rows = len(gathered.hashes_G) // dist.get_world_size()
        local = slice(gathered.first_row, gathered.first_row + rows)
        hashes_G = torch.full_like(gathered.hashes_G, -1)
        hashes_G[local] = gathered.hashes_G[local]
        gathered = gathered._replace(hashes_G=hashes_G)
        return original(*args, gathered=gathered, **kwargs)

    return [mock.patch.object(train_step, "local_info_nce", partly_masked)]


def router_bias_from_local_load() -> list[Patch]:
    """Each rank updates its router biases from its local assignments only."""
    global_sums, update_biases = train_step.global_sums, VisionLanguageModel.update_biases
    local_assignments: list[Tensor] = []

    def record(engine: Any, outputs: Any) -> Any:
        per_output = [output.router.assignments_ME for output in outputs]
        local_assignments[:] = [torch.stack(per_output).sum(dim=0)]
        return global_sums(engine, outputs)

    def update(self: Any, _assignments: Tensor, rate: float) -> None:
        update_biases(self, local_assignments[0], rate)

    return [
        mock.patch.object(train_step, "global_sums", record),
        mock.patch.object(VisionLanguageModel, "update_biases", update),
    ]
