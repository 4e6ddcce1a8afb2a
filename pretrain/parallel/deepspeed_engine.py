"""`TrainEngine` on DeepSpeed: ZeRO 0-3 with expert parallelism.

Three things are not left to DeepSpeed 0.19.8:

- clipping at ZeRO stage 0, where it would clip by the average of the ranks' norms;
- scaling for gradient accumulation: each loss passed to `backward` is a term of the step's loss;
- checkpoints, since its own are pickles and not written atomically.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups, safe_get_full_grad
from torch import Tensor

from data_pipeline.samples import Batch
from pretrain.config.schema import OptimConfig
from pretrain.model.vision_language import ModelOutput, VisionLanguageModel
from pretrain.optim.groups import build_adamw, is_expert, parameter_groups
from pretrain.parallel.collectives import all_gather_rows
from pretrain.parallel.deepspeed_moe import expert_group_name
from pretrain.parallel.deepspeed_native_moe import canonical_name
from pretrain.parallel.deepspeed_state import (
    full_parameter,
    load_optimizer_shard,
    load_partitioned_weights,
    optimizer_shard,
)
from pretrain.parallel.engine import slice_name
from pretrain.parallel.layout import Layout
from pretrain.parallel.plain_engine import (
    checked_tensor,
    load_buffers,
    model_inputs,
    routing_context,
)


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
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.layout, self.device = layout, device
        self._clip_norm = optim.clip_norm
        self._expert_group_name = expert_group_name(layout.expert_parallel_size)
        model = model.to(device)
        optimizer = build_adamw(parameter_groups(model, optim, self._expert_group_name), optim)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config, dist_init_required=False
        )
        self.model: VisionLanguageModel = self._engine.module

    def forward(
        self, batch: Batch, *, step_seed: int = 0, coactivation: bool = False
    ) -> ModelOutput:
        context = routing_context(batch, self.model.moe, self.device, step_seed, coactivation)
        output: ModelOutput = self._engine(*model_inputs(batch, self.device), context)
        return output

    def backward(self, loss: Tensor, *, last: bool) -> None:
        assert last == self._engine.is_gradient_accumulation_boundary()
        self._engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # only counts the micro-batch before the accumulation boundary

    def step(self, learning_rate: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.layout.zero_stage > 0:
            self._engine.step()
            return float(self._engine.get_global_grad_norm())
        norm = self._clip_by_global_norm()
        self._engine.step()
        return norm

    def gradients(self) -> dict[str, Tensor]:
        gradients = {}
        for name, parameter in self.model.named_parameters():
            gradient = (
                parameter.grad if self.layout.zero_stage == 0 else safe_get_full_grad(parameter)
            )
            if gradient is not None:
                gradients[self._checkpoint_name(name)] = gradient.detach().float().clone()
        return gradients

    def all_gather(self, rows: Tensor) -> Tensor:
        return all_gather_rows(rows)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        summed = values.detach().clone()
        dist.all_reduce(summed)
        return summed

    def all_ranks_true(self, value: bool) -> bool:
        num_false = torch.tensor([0 if value else 1], device=self.device)
        dist.all_reduce(num_false)
        return int(num_false) == 0

    def barrier(self) -> None:
        dist.barrier()

    def broadcast_json(self, value: Any) -> Any:
        return self.all_gather_json(value if self.rank == 0 else None)[0]

    def all_gather_json(self, value: Any) -> list[Any]:
        return all_gather_json(value, self.device)

    def model_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter in self.model.named_parameters():
            full = full_parameter(parameter)  # collective at stage 3, so every rank calls it
            writes = self.layout.writes_experts(self.rank) if is_expert(name) else self.rank == 0
            if writes:
                tensors[self._checkpoint_name(name)] = full
        if self.rank == 0:
            tensors |= {name: buffer.detach() for name, buffer in self.model.named_buffers()}
        return tensors

    def load_model_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        load_buffers(self.model, tensors)
        if self.layout.zero_stage == 3:
            return  # weights are restored from the masters, see `load_optimizer_tensors`
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(checked_tensor(tensors, self._checkpoint_name(name), parameter))

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return optimizer_shard(self._engine.optimizer, self.layout.zero_stage)

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        load_optimizer_shard(self._engine.optimizer, self.layout.zero_stage, tensors)
        if self.layout.zero_stage == 3:
            load_partitioned_weights(self._engine.optimizer)

    def _clip_by_global_norm(self) -> float:
        """Clip the gradients by their norm over all ranks; return the norm before clipping.

        Dense gradients, which all ranks share, count once; the squares of expert
        gradients are summed over the expert-parallel group.
        """
        dense: list[Tensor] = []
        experts: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                (experts if is_expert(name) else dense).append(parameter.grad)

        expert_square = _square_sum(experts, self.device)
        if experts:  # a dense model has no expert-parallel group
            dist.all_reduce(
                expert_square, group=groups._get_expert_parallel_group(self._expert_group_name)
            )
        norm = float((_square_sum(dense, self.device) + expert_square).sqrt())
        if self._clip_norm and norm > self._clip_norm:
            torch._foreach_mul_(dense + experts, self._clip_norm / (norm + 1e-6))
        return norm

    def _checkpoint_name(self, name: str) -> str:
        """Name of a parameter in `model_tensors`: the experts of this rank as `NAME@first:last`."""
        first = self.layout.first_expert(self.rank)
        canonical = canonical_name(name, first)
        if canonical is not None:
            base, expert = canonical
            return base if expert is None else slice_name(base, expert, 1)
        return slice_name(name, first, self.layout.experts_per_rank) if is_expert(name) else name


def all_gather_json(value: Any, device: torch.device) -> list[Any]:
    """Every rank's JSON value, in rank order. Sent as JSON text; no pickles."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    size = torch.tensor([data.numel()], device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)

    max_size = max(int(s) for s in sizes)
    padded = torch.zeros(max_size, dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    buffers = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(buffers, padded)
    return [
        json.loads(bytes(buffer[: int(s)].cpu().tolist()))
        for buffer, s in zip(buffers, sizes, strict=True)
    ]


def _square_sum(tensors: list[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack([t.float().square().sum() for t in tensors]).sum()
