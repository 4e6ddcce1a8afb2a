"""The interface between the training loop and the hardware: `TrainEngine`.

`PlainEngine` (one process) and `DeepSpeedEngine` implement it.

The gradients of an engine are those of the *mean over ranks* of the losses passed to `backward`,
summed over the micro-batches of a step. A loss that is one rank's term of the global loss must
therefore be multiplied by `world_size`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from data_pipeline.samples import Batch
from pretrain.model.vision_language import ModelOutput, VisionLanguageModel
from pretrain.parallel.layout import Layout


class TrainEngine(Protocol):
    """Model, optimizer and collectives of one rank."""

    rank: int
    world_size: int
    layout: Layout
    device: torch.device
    model: VisionLanguageModel
    """This rank's module. With expert parallelism every call of it is collective."""

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
        """Accumulate the gradients of `loss`; `last` is set for the last micro-batch of a step."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip the gradients, update the weights and zero the gradients; return the global gradient
        norm before clipping."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """Full gradients by parameter name, float32; valid between the last backward and the step.

        This rank's slice of the experts is named `NAME@first:last`. Collective.
        """
        ...

    def all_gather(self, rows: Tensor) -> Tensor:
        """Concatenate the rows of all ranks along dim 0, in rank order.

        Differentiable: gradients are summed over ranks and returned to the rank of each row.
        """
        ...

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, without gradient."""
        ...

    def all_ranks_true(self, value: bool) -> bool:
        """Whether `value` is true on every rank. Collective."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Collective."""
        ...

    def all_gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. Collective."""
        ...

    def model_tensors(self) -> dict[str, Tensor]:
        """The model tensors that this rank saves. Collective.

        Rank 0 saves the dense weights and the expert biases; experts are named
        `NAME@first:last`.
        """
        ...

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """This rank's optimizer shard: master weights and moments, under stable names."""
        ...

    def load_model_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the weights that this rank needs, named as in `model_tensors`. Collective."""
        ...

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load this rank's optimizer shard, saved with the same layout."""
        ...


def slice_name(name: str, first: int, count: int) -> str:
    """Name of a slice of stacked experts in files: `NAME@first:last`, `last` excluded."""
    return f"{name}@{first}:{first + count}"
