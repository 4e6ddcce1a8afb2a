"""What the training loop sees of the machines: a small contract, kept by `PlainEngine` and
`DeepSpeedEngine`.

Gradients of an engine are those of the *mean over ranks* of the losses given to `backward`, summed
over the micro-batches of a step. A loss that is a share of the global loss must therefore be
multiplied by `world`.
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
    """One rank's hold on the model, the optimizer and the other ranks."""

    rank: int
    world_size: int
    layout: Layout
    device: torch.device
    model: VisionLanguageModel
    """This rank's module; with expert parallelism every call of it is collective."""

    def forward(self, batch: Batch, *, draw: int = 0, coactivation: bool = False) -> ModelOutput:
        """Run the model on one micro-batch.

        Args:
            batch: The micro-batch.
            draw: Decides everything random of this step; the same on every rank.
            coactivation: Also count which experts are chosen together.
        """
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; `last` marks the last micro-batch of the step."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear the gradients; return the global gradient norm before clipping."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """Whole gradients by parameter name, float32, between the last backward and the step.
        Collective.

        A rank's slice of the experts appears as `name@first:last`.
        """
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all ranks along dim 0, in rank order; gradients return to their owners, summed
        over ranks."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """Sum over ranks, without gradient."""
        ...

    def agree(self, ok: bool) -> bool:
        """Whether every rank says ok. Collective."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Collective."""
        ...

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. Collective."""
        ...

    def model_tensors(self) -> dict[str, Tensor]:
        """What this rank saves of the model: dense weights and biases on rank 0, experts as
        `name@first:last`.

        Collective.
        """
        ...

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """This rank's shard of the optimizer: master weights and moments, by a stable name."""
        ...

    def load_model_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the weights this rank needs, named as `model_tensors` names them.
        Collective."""
        ...

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over this rank's shard, saved at the same layout."""
        ...


def slice_name(name: str, first: int, count: int) -> str:
    """How a slice of stacked experts is called in files: `name@first:last`, last excluded."""
    return f"{name}@{first}:{first + count}"
