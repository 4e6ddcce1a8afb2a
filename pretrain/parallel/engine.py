"""Model and optimizer of one rank: `Engine`.

`PlainEngine` (one process of plain torch, the reference) and `DeepSpeedEngine` implement it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor

from data_pipeline.samples import Batch
from pretrain.model.vision_language import ModelOutput, VisionLanguageModel
from pretrain.parallel.communicator import Communicator
from pretrain.parallel.layout import Layout
from pretrain.parallel.state_fragments import Fragment, StateReader

GradientObserver = Callable[[dict[str, Tensor]], None]
"""Receives the gradients of a step by name, see `Engine.gradients`."""


class Engine(Protocol):
    """Forward, backward, optimizer step and state of one rank.

    Names of tensors are those of `pretrain.parallel.tensor_names`.
    """

    communicator: Communicator
    layout: Layout
    model: VisionLanguageModel
    """This rank's module. With expert parallelism every call of it is collective."""
    gradient_observer: GradientObserver | None
    """Called by every rank at the start of each `step`, before clipping."""

    def forward(
        self, batch: Batch, *, step_seed: int = 0, coactivation: bool = False
    ) -> ModelOutput:
        """Run the model on one micro-batch.

        Args:
            batch: The micro-batch.
            step_seed: Seed of all random routing of this step; the same on every rank.
            coactivation: Also count which pairs of experts are assigned to the same token.
        """
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of the sum over ranks of `loss`, this rank's term of the global
        loss; `last` is set for the last micro-batch of a step."""
        ...

    def step(self, learning_rate: float, *, norm_limit: float = math.inf) -> float:
        """Clip the gradients, update the weights and zero the gradients; return the global gradient
        norm before clipping.

        If the norm is not finite or above `norm_limit`, the gradients are zeroed and nothing is
        updated: neither weights nor moments nor step counts.
        """
        ...

    def gradients(self) -> dict[str, Tensor]:
        """Full gradients of this rank's weights by name, float32; valid between the last backward
        and the step. Collective."""
        ...

    def master_weights(self) -> dict[str, Tensor]:
        """The weights that the optimizer updates, float32 on CPU, by name. Collective.

        With ZeRO and bfloat16, the weights of the module are rounded copies of these. Unlike
        `state_fragments`, every rank returns all weights that it holds, so that diverged replicas
        can be detected.
        """
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters and buffers of the whole model, with the experts of all
        ranks."""
        ...

    def state_fragments(self) -> Iterator[Fragment]:
        """What this rank saves of weights, moments and buffers: over all ranks, every value
        once."""
        ...

    def load_state(self, reader: StateReader) -> None:
        """Load weights, moments and buffers that any layout has saved. Collective.

        Raises:
            CheckpointError: A value is missing.
        """
        ...

    def close(self) -> None:
        """Free references to this engine outside of it; it cannot be used afterwards."""
        ...
