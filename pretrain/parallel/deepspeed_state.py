"""Access to the state of DeepSpeed's optimizers: master weights and moments by parameter.

DeepSpeed saves them as pickles; here the tensors are accessed directly. Stages 1 and 2 keep one
flat float32 partition per parameter group, stage 3 one per sub-group; stage 0 leaves the state in
torch's optimizer (`state_fragments.replicated_fragments`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.parallel.layout import Layout
from pretrain.parallel.state_fragments import (
    MOMENTS,
    WEIGHT,
    Fragment,
    StateReader,
    adam_state,
    first_value,
    load_weights,
)


class _Part(NamedTuple):
    """A range of a parameter in a flat partition of this rank."""

    parameter: nn.Parameter
    first: int
    """Index of its first value in this rank's parameter."""
    offset: int
    """Index of its first value in the partition."""
    size: int


def partition_fragments(
    model: nn.Module, optimizer: Any, layout: Layout, rank: int
) -> Iterator[Fragment]:
    """What this rank saves with ZeRO 1 to 3: the ranges of its partitions."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for partition, parts in _partitions(optimizer, layout.zero_stage):
        state = optimizer.optimizer.state.get(partition, {})
        values = {WEIGHT: partition} | {kind: state[kind] for kind in MOMENTS if kind in state}
        for part in parts:
            name, end = names[part.parameter], part.offset + part.size
            yield Fragment(
                name,
                first_value(name, part.parameter, layout, rank) + part.first,
                {kind: t.detach().view(-1)[part.offset : end] for kind, t in values.items()},
                steps=int(state.get("step", 0)),
            )


def load_partitions(
    model: nn.Module, optimizer: Any, layout: Layout, rank: int, reader: StateReader
) -> None:
    """Load weights, master weights and moments with ZeRO 1 to 3. Collective.

    Raises:
        CheckpointError: A value is missing.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    if layout.zero_stage < 3:
        load_weights(model, layout, rank, reader)
    for partition, parts in _partitions(optimizer, layout.zero_stage):
        steps = max((reader.steps(names[part.parameter]) for part in parts), default=0)
        # Zeros where the partition is padded, and for parameters that had no gradient yet.
        moments = {kind: torch.zeros_like(partition) for kind in MOMENTS} if steps else {}
        for part in parts:
            name, end = names[part.parameter], part.offset + part.size
            first = first_value(name, part.parameter, layout, rank) + part.first
            weight = reader.read(name, WEIGHT, first, part.size)
            partition.data.view(-1)[part.offset : end].copy_(weight)
            if reader.steps(name):
                for kind, moment in moments.items():
                    value = reader.read(name, kind, first, part.size)
                    moment.view(-1)[part.offset : end].copy_(value)
        if steps:
            optimizer.optimizer.state[partition] = adam_state(steps, moments, partition.device)
        else:
            optimizer.optimizer.state.pop(partition, None)
    if layout.zero_stage == 3:
        _update_partitioned_weights(optimizer)


def _partitions(optimizer: Any, zero_stage: int) -> Iterator[tuple[Tensor, list[_Part]]]:
    """Every flat float32 partition of this rank, and the ranges of parameters in it."""
    if zero_stage == 3:
        for partition, parameters in zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True
        ):
            yield partition, list(_stage_3_parts(parameters))
        return
    for group, partition in enumerate(optimizer.single_partition_of_fp32_groups):
        size = int(optimizer.partition_size[group])
        begin = size * dist.get_rank(group=optimizer.real_dp_process_group[group])
        parts = []
        for parameter, offset in zip(
            optimizer.round_robin_bit16_groups[group],
            optimizer.round_robin_bit16_offsets[group],
            strict=True,
        ):
            first, end = max(offset, begin), min(offset + parameter.numel(), begin + size)
            if first < end:
                parts.append(_Part(parameter, first - offset, first - begin, end - first))
        yield partition, parts


def _stage_3_parts(parameters: list[nn.Parameter]) -> Iterator[_Part]:
    offset = 0
    for parameter in parameters:
        size, numel = parameter.partition_numel(), parameter.ds_numel  # type: ignore[attr-defined]
        first = size * parameter.ds_zero_partition_rank  # type: ignore[attr-defined]
        if first < numel:
            yield _Part(parameter, first, offset, min(size, numel - first))
        offset += size


def _update_partitioned_weights(optimizer: Any) -> None:
    """Stage 3: copy the master weights into the partitioned weights, as an optimizer step does."""
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer.fp16_partitioned_groups_flat[group].data.copy_(
            optimizer.fp32_partitioned_groups_flat[group].data
        )
        optimizer._unflatten_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        persistent = optimizer.persistent_parameters
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)
