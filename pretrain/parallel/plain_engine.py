"""Single-process engine in plain PyTorch: the reference for every parallel engine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from data_pipeline.samples import Batch
from pretrain.config.schema import OptimConfig
from pretrain.model.vision_language import ModelOutput, VisionLanguageModel
from pretrain.optim.groups import build_adamw, parameter_groups
from pretrain.parallel.communicator import Communicator, LocalCommunicator
from pretrain.parallel.engine import GradientObserver
from pretrain.parallel.inputs import model_inputs
from pretrain.parallel.layout import Layout
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


class PlainEngine:
    """`Engine` for a world size of 1."""

    def __init__(
        self, model: VisionLanguageModel, optim: OptimConfig, layout: Layout, device: torch.device
    ) -> None:
        self.communicator: Communicator = LocalCommunicator(device)
        self.layout = layout
        self.model = model.to(device)
        self.gradient_observer: GradientObserver | None = None
        self._clip_norm = optim.clip_norm
        self._optimizer = build_adamw(parameter_groups(self.model, optim, "experts"), optim)

    def forward(
        self, batch: Batch, *, step_seed: int = 0, coactivation: bool = False
    ) -> ModelOutput:
        device = self.communicator.device
        inputs = model_inputs(
            batch, self.model, device, step_seed=step_seed, coactivation=coactivation
        )
        return self.model(*inputs)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float, *, norm_limit: float = math.inf) -> float:
        if self.gradient_observer is not None:
            self.gradient_observer(self.gradients())
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm = clip_gradients(
            [p.grad for p in self.model.parameters() if p.grad is not None], self._clip_norm
        )
        if is_accepted(norm, norm_limit):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def gradients(self) -> dict[str, Tensor]:
        return {
            self._name(name): parameter.grad.detach().float().clone()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }

    def master_weights(self) -> dict[str, Tensor]:
        return {
            self._name(name): parameter.detach().to("cpu", copy=True)
            for name, parameter in self.model.named_parameters()
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return global_shapes(self.model, self.layout)

    def state_fragments(self) -> Iterator[Fragment]:
        yield from replicated_fragments(self.model, self._optimizer, self.layout, 0)
        yield from buffer_fragments(self.model)

    def load_state(self, reader: StateReader) -> None:
        load_replicated(self.model, self._optimizer, self.layout, 0, reader)
        load_buffers(self.model, reader)

    def close(self) -> None:
        return None

    def _name(self, parameter_name: str) -> str:
        return tensor_name(parameter_name, self.layout, self.communicator.rank)


def is_accepted(norm: float, limit: float) -> bool:
    """Whether a step with this gradient norm updates the weights."""
    return math.isfinite(norm) and norm <= limit


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
