"""One process, plain torch: the reference that every parallel engine must equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data_pipeline.common.errors import CheckpointError, DataError
from data_pipeline.samples import Batch
from pretrain.config.experts import MoEConfig
from pretrain.config.schema import OptimConfig
from pretrain.model.vision_language import ModelOutput, RoutingFacts, VisionLanguageModel
from pretrain.optim.groups import build_adamw, is_expert, parameter_groups
from pretrain.parallel.engine import slice_name
from pretrain.parallel.layout import Layout


class PlainEngine:
    """`TrainEngine` without other ranks."""

    def __init__(
        self, model: VisionLanguageModel, optim: OptimConfig, layout: Layout, device: torch.device
    ) -> None:
        self.rank, self.world_size, self.layout, self.device = 0, 1, layout, device
        self.model = model.to(device)
        self._clip_norm = optim.clip_norm
        self._optimizer = build_adamw(parameter_groups(self.model, optim, "experts"), optim)

    def forward(self, batch: Batch, *, draw: int = 0, coactivation: bool = False) -> ModelOutput:
        facts = routing_facts(batch, self.model.moe, self.device, draw, coactivation)
        return self.model(*model_inputs(batch, self.device), facts)  # type: ignore[no-any-return]

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
            _file_name(name, parameter): parameter.grad.detach().float().clone()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }

    def gather(self, rows: Tensor) -> Tensor:
        return rows

    def total(self, values: Tensor) -> Tensor:
        return values.detach()

    def agree(self, ok: bool) -> bool:
        return ok

    def barrier(self) -> None:
        return None

    def broadcast_json(self, value: Any) -> Any:
        return value

    def gather_json(self, value: Any) -> list[Any]:
        return [value]

    def model_tensors(self) -> dict[str, Tensor]:
        weights = {_file_name(n, p): p.detach() for n, p in self.model.named_parameters()}
        return weights | {name: buffer.detach() for name, buffer in self.model.named_buffers()}

    def load_model_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(take(tensors, _file_name(name, parameter), parameter))
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


def clip_gradients(gradients: Sequence[Tensor], limit: float) -> float:
    """Scale gradients in place so that their common norm is at most `limit`; the norm before.

    Squares are added up in float64, as torch's own `clip_grad_norm_` does not: on CPU its float32
    sums are off by 1e-5 for a tensor of a million elements and by 1e-3 for one of thirty million,
    and this engine is what others are judged by.

    Args:
        gradients: Of all parameters that have one.
        limit: Largest norm; 0 turns clipping off.
    """
    if not gradients:
        return 0.0
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    norm = float(torch.linalg.vector_norm(torch.stack(norms)))
    if limit and norm > limit:
        torch._foreach_mul_(list(gradients), limit / (norm + 1e-6))
    return norm


def model_inputs(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a batch that the model reads, on `device`."""
    tensors = (batch.images, batch.text_ids, batch.text_lengths, batch.text_positions)
    images, ids, lengths, positions = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return images, ids, lengths, positions


def routing_facts(
    batch: Batch, moe: MoEConfig, device: torch.device, draw: int, coactivation: bool
) -> RoutingFacts:
    """What routing depends on beside the tokens, on `device`.

    Capacity groups are consecutive pairs of the global batch. A micro-batch holds whole groups, so
    that a pair's group is its row as it was asked for, whichever others are missing.

    Raises:
        DataError: The batch does not say which samples it holds, but this run's routing depends on
        it.
    """

    def per_pair(values: Tensor, what: str) -> Tensor:
        if len(values) != len(batch.images):
            raise DataError(
                f"a batch of {len(batch.images)} pairs has {len(values)} {what}; this run's routing "
                f"(moe.routing {moe.routing}, moe.capacity_factor {moe.capacity_factor}) needs one a pair"
            )
        return values

    facts = RoutingFacts(draw=draw, coactivation=coactivation)
    if moe.is_random:
        facts = facts._replace(pair_ids_B=per_pair(batch.ids, "ids").to(device, non_blocking=True))
    if moe.capacity_factor:
        slots_B = per_pair(batch.slots, "slots")
        group_B = torch.div(slots_B, moe.capacity_group_size, rounding_mode="floor")
        # Counted on the host, where the batch still lies.
        num_groups = int(group_B.max()) + 1 if len(group_B) else 0
        facts = facts._replace(group_B=group_B.to(device, non_blocking=True), num_groups=num_groups)
    return facts


BIAS = ".bias.value"
"""How names of routers' biases end (`pretrain.moe.bias.SelectionBias` in `MoELayer.bias`)."""


def load_buffers(model: VisionLanguageModel, tensors: Mapping[str, Tensor]) -> None:
    """Take over the state that is no weight: the biases of the routers' choices.

    Raises:
        CheckpointError: The checkpoint lacks one, or has one that this run's model has no place
        for.
    """
    buffers = dict(model.named_buffers())
    unknown = sorted(name for name in tensors if name.endswith(BIAS) and name not in buffers)
    if unknown:
        raise CheckpointError(
            f"the checkpoint has {len(unknown)} layers with learned biases of the choice, such as {unknown[0]!r}, but "
            f"this run's model has no place for them: without them tokens would go to other experts. Set balance.bias "
            f"and balance.bias_per_modality as in config.yaml of the run folder, or start in another folder"
        )
    for name, buffer in buffers.items():
        buffer.copy_(take(tensors, name, buffer))


def take(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A tensor of a checkpoint by name, of the shape of `like`, or a clear error."""
    found = tensors.get(name)
    if found is None or found.shape != like.shape:
        what = f"no {name!r}" if found is None else f"{name!r} as {list(found.shape)}"
        raise CheckpointError(
            f"the checkpoint has {what}, but this run's model needs {list(like.shape)}: it was written by a "
            f"model of another shape. Set the model, moe and balance sections as in config.yaml of the run folder "
            f"(balance.bias and balance.bias_per_modality decide which biases there are), or start in another folder"
        )
    return found


def _file_name(name: str, parameter: Tensor) -> str:
    return slice_name(name, 0, parameter.shape[0]) if is_expert(name) else name
