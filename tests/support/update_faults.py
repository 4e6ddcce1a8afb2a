"""Faults in gradients, weights and the optimizer, injected by patching the training code."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.optim.groups import is_expert
from pretrain.parallel import deepspeed_engine, deepspeed_moe
from pretrain.parity import worker

Patch = Any
"""A patcher of `mock.patch.object`, to be entered as a context manager."""


def expert_gradients_scaled_by_expert_parallel_size() -> list[Patch]:
    """Expert gradients, which already include the tokens of all ranks of an expert-parallel group,
    are multiplied by its size."""
    original = worker.build_engine

    def build(*args: Any) -> Any:
        engine = original(*args)
        for name, parameter in engine.model.named_parameters():
            if is_expert(name):
                parameter.register_hook(
                    lambda gradient: gradient * engine.layout.expert_parallel_size
                )
        return engine

    return [mock.patch.object(worker, "build_engine", build)]


def clip_by_mean_of_local_norms() -> list[Patch]:
    """Gradients are clipped by the mean of the ranks' local norms."""

    def clip(self: Any) -> float:
        parameters = self.model.parameters()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        squares = [gradient.float().square().sum() for gradient in gradients]
        norm = torch.stack(squares).sum().sqrt()
        dist.all_reduce(norm)
        mean_norm = float(norm) / self.communicator.world_size
        if mean_norm > self._clip_norm:
            torch._foreach_mul_(gradients, self._clip_norm / (mean_norm + 1e-6))
        return mean_norm

    return [mock.patch.object(deepspeed_engine.DeepSpeedEngine, "_clip_by_global_norm", clip)]


def expert_weight_not_tagged() -> list[Patch]:
    """One expert weight is not tagged as expert-parallel, so rank 0's values are broadcast."""
    original = deepspeed_moe.DeepSpeedMoELayer._tag_expert

    def tag_expert(self: Any, parameter: Any) -> None:
        if parameter is not self.experts.w2 or self.block_index != 1:
            original(self, parameter)

    return [mock.patch.object(deepspeed_moe.DeepSpeedMoELayer, "_tag_expert", tag_expert)]


def expert_gradient_averaged_over_ranks() -> list[Patch]:
    """The gradient of one expert weight is averaged over ranks, although their experts differ."""
    original = worker.build_engine

    def build(*args: Any) -> Any:
        engine = original(*args)
        engine.model.get_parameter("blocks.1.ffn.experts.w2").allreduce = True
        return engine

    return [mock.patch.object(worker, "build_engine", build)]


def perturbed_weights_on_last_rank() -> list[Patch]:
    """The last rank starts with slightly different weights."""
    original = worker.build_engine

    def build(*args: Any) -> Any:
        engine = original(*args)
        if engine.communicator.rank == engine.communicator.world_size - 1:
            engine.model.get_parameter("caption_norm.weight").data.mul_(1 + 1e-6)
        return engine

    return [mock.patch.object(worker, "build_engine", build)]


def scaled_gradients_on_last_rank() -> list[Patch]:
    """The gradient of one weight of the last rank's experts is too large."""
    original = worker.build_engine

    def build(*args: Any) -> Any:
        engine = original(*args)
        if engine.communicator.rank == engine.communicator.world_size - 1:
            engine.model.get_parameter("blocks.2.ffn.experts.w3").register_hook(
                lambda gradient: gradient * 1.001
            )
        return engine

    return [mock.patch.object(worker, "build_engine", build)]


def learning_rate_never_updated() -> list[Patch]:
    """The optimizer keeps its initial learning rate."""
    original = deepspeed_engine.DeepSpeedEngine.step

    def step(self: Any, learning_rate: float, **limit: float) -> float:
        return original(self, self._engine.optimizer.param_groups[0]["lr"], **limit)

    return [mock.patch.object(deepspeed_engine.DeepSpeedEngine, "step", step)]


def earlier_micro_batches_dropped() -> list[Patch]:
    """Gradients of all micro-batches but the last are dropped."""
    original = deepspeed_engine.DeepSpeedEngine.backward

    def backward(self: Any, loss: Tensor, *, last: bool) -> None:
        original(self, loss if last else 0.0 * loss, last=last)

    return [mock.patch.object(deepspeed_engine.DeepSpeedEngine, "backward", backward)]


def missing_expert_gradients_of_last_rank() -> list[Patch]:
    """The engine of the last rank returns no gradients of its experts."""
    original = deepspeed_engine.DeepSpeedEngine.gradients

    def gradients(self: Any) -> Any:
        tensors = original(self)
        if self.communicator.rank == self.communicator.world_size - 1:
            tensors = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        return tensors

    return [mock.patch.object(deepspeed_engine.DeepSpeedEngine, "gradients", gradients)]


def gradients_accumulated_in_bfloat16() -> list[Patch]:
    """After every micro-batch the accumulated gradients are rounded to bfloat16."""
    original = deepspeed_engine.DeepSpeedEngine.backward

    def backward(self: Any, loss: Tensor, *, last: bool) -> None:
        original(self, loss, last=last)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(parameter.grad.bfloat16())

    return [mock.patch.object(deepspeed_engine.DeepSpeedEngine, "backward", backward)]
