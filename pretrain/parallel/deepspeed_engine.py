"""`Engine` on DeepSpeed: ZeRO 0-3 with expert parallelism.

Four things are not left to DeepSpeed 0.19.8:

- clipping at ZeRO stage 0, where it would clip by the average of the ranks' norms;
- scaling for gradient accumulation: each loss passed to `backward` is a term of the step's loss;
- which steps are skipped, since stage 0 updates weights with gradients that are not finite;
- checkpoints, since its own are pickles and not written atomically.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups, safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor

from data_pipeline.samples import Batch
from pretrain.config.schema import OptimConfig
from pretrain.model.vision_language import ModelOutput, VisionLanguageModel
from pretrain.optim.groups import build_adamw, is_expert, parameter_groups
from pretrain.parallel.communicator import Communicator, TorchCommunicator
from pretrain.parallel.deepspeed_moe import expert_group_name
from pretrain.parallel.deepspeed_norm import GradientNorm
from pretrain.parallel.deepspeed_state import load_partitions, partition_fragments
from pretrain.parallel.engine import GradientObserver
from pretrain.parallel.inputs import model_inputs
from pretrain.parallel.layout import Layout
from pretrain.parallel.plain_engine import is_accepted
from pretrain.parallel.state_fragments import (
    Fragment,
    StateReader,
    buffer_fragments,
    global_shapes,
    load_buffers,
    load_replicated,
    replicated_fragments,
)
from pretrain.parallel.tensor_names import tensor_name


class DeepSpeedEngine:
    """One rank of a DeepSpeed run."""

    def __init__(
        self,
        model: VisionLanguageModel,
        optim: OptimConfig,
        layout: Layout,
        device: torch.device,
        deepspeed_config: dict[str, Any],
    ) -> None:
        self.communicator: Communicator = TorchCommunicator(device)
        self.layout = layout
        self.gradient_observer: GradientObserver | None = None
        self._clip_norm = optim.clip_norm
        self._expert_group_name = expert_group_name(layout.expert_parallel_size)
        model = model.to(device)
        optimizer = build_adamw(parameter_groups(model, optim, self._expert_group_name), optim)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config, dist_init_required=False
        )
        self.model: VisionLanguageModel = self._engine.module
        self._norm = GradientNorm(self._engine.optimizer, layout.zero_stage)

    def forward(
        self, batch: Batch, *, step_seed: int = 0, coactivation: bool = False
    ) -> ModelOutput:
        device = self.communicator.device
        inputs = model_inputs(
            batch, self.model, device, step_seed=step_seed, coactivation=coactivation
        )
        output: ModelOutput = self._engine(*inputs)
        return output

    def backward(self, loss: Tensor, *, last: bool) -> None:
        assert last == self._engine.is_gradient_accumulation_boundary()
        # DeepSpeed averages gradients over ranks.
        self._engine.backward(self.communicator.world_size * loss, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # only counts the micro-batch before the accumulation boundary

    def step(self, learning_rate: float, *, norm_limit: float = math.inf) -> float:
        if self.gradient_observer is not None:
            self.gradient_observer(self.gradients())
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.layout.zero_stage > 0:
            self._norm.start(norm_limit)
            self._engine.step()
            return self._norm.value
        norm = self._clip_by_global_norm()
        if not is_accepted(norm, norm_limit):
            self._engine.optimizer.zero_grad(set_to_none=True)  # nothing is left to update
        self._engine.step()
        return norm

    def gradients(self) -> dict[str, Tensor]:
        gradients = {}
        for name, parameter in self.model.named_parameters():
            gradient = (
                parameter.grad if self.layout.zero_stage == 0 else safe_get_full_grad(parameter)
            )
            if gradient is not None:
                gradients[self._name(name)] = gradient.detach().float().clone()
        return gradients

    def master_weights(self) -> dict[str, Tensor]:
        weights = {}
        for name, parameter in self.model.named_parameters():
            full = parameter
            if self.layout.zero_stage > 0:
                full = safe_get_full_fp32_param(parameter)
            # `copy`: on CPU this would otherwise alias the parameter, which the next step updates.
            weights[self._name(name)] = full.detach().to("cpu", copy=True)
        return weights

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return global_shapes(self.model, self.layout)

    def state_fragments(self) -> Iterator[Fragment]:
        save = partition_fragments if self.layout.zero_stage else replicated_fragments
        yield from save(*self._state())
        if self.communicator.rank == 0:
            yield from buffer_fragments(self.model)

    def load_state(self, reader: StateReader) -> None:
        if self.layout.zero_stage:
            load_partitions(*self._state(), reader)
        else:
            load_replicated(*self._state(), reader)
        load_buffers(self.model, reader)

    def _clip_by_global_norm(self) -> float:
        """Clip the gradients by their norm over all ranks; return the norm before clipping.

        Dense gradients, which all ranks share, count once; the squares of expert
        gradients are summed over the expert-parallel group.
        """
        device = self.communicator.device
        dense: list[Tensor] = []
        experts: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                (experts if is_expert(name) else dense).append(parameter.grad)

        expert_square = _square_sum(experts, device)
        if experts:  # a dense model has no expert-parallel group
            dist.all_reduce(
                expert_square, group=groups._get_expert_parallel_group(self._expert_group_name)
            )
        norm = float((_square_sum(dense, device) + expert_square).sqrt())
        if self._clip_norm and norm > self._clip_norm:
            torch._foreach_mul_(dense + experts, self._clip_norm / (norm + 1e-6))
        return norm

    def close(self) -> None:
        self._engine.destroy()

    def _state(self) -> tuple[VisionLanguageModel, Any, Layout, int]:
        """What the functions for state of a rank need."""
        return self.model, self._engine.optimizer, self.layout, self.communicator.rank

    def _name(self, parameter_name: str) -> str:
        return tensor_name(parameter_name, self.layout, self.communicator.rank)


def _square_sum(tensors: list[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack([t.float().square().sum() for t in tensors]).sum()
