"""Single-process engine in plain PyTorch: the reference for every parallel engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data_pipeline.common.errors import CheckpointError, DataError
from data_pipeline.samples import Batch
from pretrain.config.experts import MoEConfig
from pretrain.config.schema import OptimConfig
from pretrain.model.routing_context import RoutingContext
from pretrain.model.vision_language import ModelOutput, VisionLanguageModel
from pretrain.optim.groups import build_adamw, is_expert, parameter_groups
from pretrain.parallel.engine import slice_name
from pretrain.parallel.layout import Layout


class PlainEngine:
    """`TrainEngine` for a world size of 1."""

    def __init__(
        self, model: VisionLanguageModel, optim: OptimConfig, layout: Layout, device: torch.device
    ) -> None:
        self.rank, self.world_size, self.layout, self.device = 0, 1, layout, device
        self.model = model.to(device)
        self._clip_norm = optim.clip_norm
        self._optimizer = build_adamw(parameter_groups(self.model, optim, "experts"), optim)

    def forward(
        self, batch: Batch, *, step_seed: int = 0, coactivation: bool = False
    ) -> ModelOutput:
        context = routing_context(batch, self.model.moe, self.device, step_seed, coactivation)
        return self.model(*model_inputs(batch, self.device), context)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm = clip_gradients(
            [p.grad for p in self.model.parameters() if p.grad is not None], self._clip_norm
        )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def gradients(self) -> dict[str, Tensor]:
        return {
            _checkpoint_name(name, parameter): parameter.grad.detach().float().clone()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }

    def all_gather(self, rows: Tensor) -> Tensor:
        return rows

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return values.detach()

    def all_ranks_true(self, value: bool) -> bool:
        return value

    def barrier(self) -> None:
        return None

    def broadcast_json(self, value: Any) -> Any:
        return value

    def all_gather_json(self, value: Any) -> list[Any]:
        return [value]

    def model_tensors(self) -> dict[str, Tensor]:
        weights = {_checkpoint_name(n, p): p.detach() for n, p in self.model.named_parameters()}
        return weights | {name: buffer.detach() for name, buffer in self.model.named_buffers()}

    def load_model_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(
                    checked_tensor(tensors, _checkpoint_name(name, parameter), parameter)
                )
            load_buffers(self.model, tensors)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            state = {
                key: tensors[f"{name}/{key}"].to(parameter.device).clone()
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{name}/{key}" in tensors
            }
            if state:
                self._optimizer.state[parameter] = state


def clip_gradients(gradients: Sequence[Tensor], max_norm: float) -> float:
    """Clip gradients in place by their global norm; returns the norm before clipping.

    Squares are summed in float64, unlike in `torch.nn.utils.clip_grad_norm_`: on CPU its float32
    sums have a relative error of 1e-5 for a tensor of 1M elements and of 1e-3 for 30M, too much for
    a reference.

    Args:
        gradients: Gradients of all parameters that have one.
        max_norm: Largest norm; 0 disables clipping.
    """
    if not gradients:
        return 0.0
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    norm = float(torch.linalg.vector_norm(torch.stack(norms)))
    if max_norm and norm > max_norm:
        torch._foreach_mul_(list(gradients), max_norm / (norm + 1e-6))
    return norm


def model_inputs(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, text ids, text lengths and text positions of a batch, on `device`."""
    tensors = (batch.images, batch.text_ids, batch.text_lengths, batch.text_positions)
    images, ids, lengths, positions = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return images, ids, lengths, positions


def routing_context(
    batch: Batch, moe: MoEConfig, device: torch.device, step_seed: int, coactivation: bool
) -> RoutingContext:
    """Inputs of routing other than the tokens, on `device`.

    Capacity groups are consecutive pairs of the global batch. A micro-batch holds whole groups, so
    the group of a pair follows from its slot in the micro-batch, whether or not other samples were
    skipped.

    Raises:
        DataError: This run's routing needs sample ids or slots, but the batch has none.
    """

    def check_length(values: Tensor, name: str) -> Tensor:
        if len(values) != len(batch.images):
            raise DataError(
                f"a batch of {len(batch.images)} pairs has {len(values)} {name}; this run's "
                f"routing (moe.routing {moe.routing}, moe.capacity_factor {moe.capacity_factor}) "
                f"needs one per pair"
            )
        return values

    context = RoutingContext(step_seed=step_seed, coactivation=coactivation)
    if moe.is_random:
        pair_ids_B = check_length(batch.ids, "ids")
        context = context._replace(pair_ids_B=pair_ids_B.to(device, non_blocking=True))
    if moe.capacity_factor:
        slots_B = check_length(batch.slots, "slots")
        group_B = torch.div(slots_B, moe.capacity_group_size, rounding_mode="floor")
        # Computed before the copy to the device, to avoid a synchronization.
        num_groups = int(group_B.max()) + 1 if len(group_B) else 0
        context = context._replace(
            group_B=group_B.to(device, non_blocking=True), num_groups=num_groups
        )
    return context


BIAS_SUFFIX = ".bias.value"
"""Suffix of the names of expert biases (`pretrain.moe.bias.ExpertBias` in `MoELayer.bias`)."""


def load_buffers(model: VisionLanguageModel, tensors: Mapping[str, Tensor]) -> None:
    """Load the buffers of a model: the expert biases.

    Raises:
        CheckpointError: The checkpoint lacks a bias, or has one that this run's model does not.
    """
    buffers = dict(model.named_buffers())
    unexpected = sorted(n for n in tensors if n.endswith(BIAS_SUFFIX) and n not in buffers)
    if unexpected:
        raise CheckpointError(
            f"the checkpoint has expert biases in {len(unexpected)} layers, such as "
            f"{unexpected[0]!r}, but this run's model has none there; without them tokens would be "
            f"routed to other experts. Set balance.bias and balance.bias_per_modality as in "
            f"config.yaml of the run folder, or use another run folder"
        )
    for name, buffer in buffers.items():
        buffer.copy_(checked_tensor(tensors, name, buffer))


def checked_tensor(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """The tensor of a checkpoint with this name, which must have the shape of `like`.

    Raises:
        CheckpointError: There is no such tensor, or it has another shape.
    """
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != like.shape:
        actual = f"no {name!r}" if tensor is None else f"{name!r} of shape {list(tensor.shape)}"
        raise CheckpointError(
            f"the checkpoint has {actual}, but this run's model needs shape {list(like.shape)}. "
            f"Set the model, moe and balance sections as in config.yaml of the run folder "
            f"(balance.bias and balance.bias_per_modality determine the biases), or use another "
            f"run folder"
        )
    return tensor


def _checkpoint_name(name: str, parameter: Tensor) -> str:
    """Name of a parameter in `model_tensors`."""
    return slice_name(name, 0, parameter.shape[0]) if is_expert(name) else name
