"""Faults in routing and communication, injected by patching the training code."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pretrain.moe.layer import Router
from pretrain.moe.routing import gate_scores
from pretrain.parallel import deepspeed_engine, expert_dispatch
from pretrain.train import step as train_step

Patch = Any


def expert_outputs_swapped() -> list[Patch]:
    """Two outputs of one expert are returned to the wrong tokens."""
    original = expert_dispatch.all_to_all_rows

    def exchange_and_swap(x: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        rows = original(x, send, receive, group)
        order = list(range(len(rows)))
        order[:2] = order[:2][::-1]  # rows are sorted by expert
        return rows.index_select(0, torch.tensor(order, dtype=torch.int64))

    return [mock.patch.object(expert_dispatch, "all_to_all_rows", exchange_and_swap)]


def router_in_bfloat16() -> list[Patch]:
    """Router logits are computed in bfloat16 instead of float32."""
    original = Router.forward

    def rounded(self: Any, x_TD: Tensor | None = None) -> Tensor:
        if x_TD is None:
            return original(self)
        return F.linear(x_TD.bfloat16(), self.weight.bfloat16()).float()

    return [mock.patch.object(Router, "forward", rounded)]


def routing_noise_seeded_by_rank() -> list[Patch]:
    """The random numbers of routing depend on the rank, as if each rank had its own generator."""
    original = train_step.derive_step_seed

    def seeded_by_rank(seed: int, step: int) -> int:
        return original(seed + dist.get_rank(), step)

    return [mock.patch.object(train_step, "derive_step_seed", seeded_by_rank)]


def capacity_groups_shifted_by_missing_pairs() -> list[Patch]:
    """Capacity groups consist of the remaining pairs instead of the slots of the batch."""
    original = deepspeed_engine.model_inputs

    def renumbered(batch: Any, *args: Any, **options: Any) -> Any:
        return original(batch._replace(slots=torch.arange(len(batch.slots))), *args, **options)

    return [mock.patch.object(deepspeed_engine, "model_inputs", renumbered)]


def negated_router_logits() -> list[Patch]:
    """Rank 1 routes by negated logits, as if its code or weights were outdated."""

    def stale(logits_TE: Tensor, score: Any) -> Tensor:
        return gate_scores(-logits_TE if dist.get_rank() == 1 else logits_TE, score)

    return [mock.patch("pretrain.moe.routing.gate_scores", stale)]


def one_rank_hangs() -> list[Patch]:
    """One rank never reaches the all-to-all."""
    original = expert_dispatch.ExpertParallelDispatcher.run

    def hang(self: Any, *args: Any) -> Any:
        if dist.get_rank() == 1:
            time.sleep(3600)
        return original(self, *args)

    return [mock.patch.object(expert_dispatch.ExpertParallelDispatcher, "run", hang)]


def one_rank_raises() -> list[Patch]:
    """One rank raises an error while the others wait for it."""
    original = deepspeed_engine.model_inputs

    def fail(*args: Any, **options: Any) -> Any:
        if dist.get_rank() == 1:
            raise RuntimeError("injected error")
        return original(*args, **options)

    return [mock.patch.object(deepspeed_engine, "model_inputs", fail)]
