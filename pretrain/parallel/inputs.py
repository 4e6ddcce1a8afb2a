"""A micro-batch as inputs of the model, on the device of an engine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.common.errors import DataError
from data_pipeline.samples import Batch
from pretrain.model.vision_language import VisionLanguageModel
from pretrain.moe.tokens import TokenBatch


class ModelInputs(NamedTuple):
    """Arguments of `VisionLanguageModel.forward`."""

    images: Tensor
    text_ids: Tensor
    text_lengths: Tensor
    tokens: TokenBatch


def model_inputs(
    batch: Batch,
    model: VisionLanguageModel,
    device: torch.device,
    *,
    step_seed: int = 0,
    coactivation: bool = False,
) -> ModelInputs:
    """Copy a micro-batch to `device` and describe its tokens.

    Capacity groups are consecutive pairs of the global batch. A micro-batch holds whole groups, so
    the group of a pair follows from its slot in the micro-batch, whether or not other samples were
    skipped.

    Raises:
        DataError: This run's routing needs sample ids or slots, but the batch has none.
    """
    moe = model.moe

    def per_pair(values: Tensor, name: str) -> Tensor:
        if len(values) != len(batch.images):
            raise DataError(
                f"a batch of {len(batch.images)} pairs has {len(values)} {name}; this run's "
                f"routing (moe.routing {moe.routing}, moe.capacity_factor {moe.capacity_factor}) "
                f"needs one per pair"
            )
        return values

    tensors = (batch.images, batch.text_ids, batch.text_lengths, batch.text_positions)
    images, ids, lengths, positions = (tensor.to(device, non_blocking=True) for tensor in tensors)
    tokens = model.token_batch(ids, positions)
    tokens = tokens._replace(step_seed=step_seed, coactivation=coactivation)
    if model.needs_sample_ids:
        sample_ids_B = per_pair(batch.ids, "ids")
        tokens = tokens.with_sample_ids(sample_ids_B.to(device, non_blocking=True))
    if moe.uses_capacity:
        slots_B = per_pair(batch.slots, "slots")
        group_B = torch.div(slots_B, moe.capacity_group_size, rounding_mode="floor")
        # Computed before the copy to the device, to avoid a synchronization.
        num_groups = int(group_B.max()) + 1 if len(group_B) else 0
        tokens = tokens.with_capacity_groups(group_B.to(device, non_blocking=True), num_groups)
    return ModelInputs(images, ids, lengths, tokens)
