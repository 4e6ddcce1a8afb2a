"""The state of a run in pieces that do not depend on the parallel layout.

Weights, and the moments of Adam, are named after their parameter. A rank holds *fragments* of them:
ranges of the values of a parameter in row-major order. The experts of a layer are one parameter
`[experts, ...]` over all ranks, so what a rank holds of its experts is a range of that parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pretrain.optim.groups import is_expert
from pretrain.parallel.layout import Layout

WEIGHT, VALUE = "weight", "value"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS, VALUE)
"""What is saved of a parameter: the weight that the optimizer updates and Adam's moments, float32;
of a buffer its value."""


class Fragment(NamedTuple):
    """A range of a parameter or buffer that one rank holds."""

    name: str
    start: int
    """Index of its first value in the whole parameter, in row-major order."""
    values: Mapping[str, Tensor]
    """By kind, of equal size, `[values]`; views of the state or of a copy."""
    steps: int = 0
    """Adam's step count; 0 before its moments exist."""


class StateReader(Protocol):
    """Reads any range of a saved state."""

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        """Values `start` to `start + count - 1` of a parameter, `[count]` on CPU.

        Raises:
            CheckpointError: The state does not have all of them.
        """
        ...

    def steps(self, name: str) -> int:
        """Adam's step count of a parameter; 0 if there are no moments."""
        ...

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that the saved parameters and buffers are those of the model.

        Raises:
            CheckpointError: One is missing, has another shape, or is not in the model.
        """
        ...


def global_shapes(model: nn.Module, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters and buffers of the whole model, with the experts of all ranks."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        shape = local_shape(parameter)
        shapes[name] = (layout.num_experts, *shape[1:]) if is_expert(name) else shape
    return shapes | {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}


def local_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter on its rank, also if ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def first_value(name: str, parameter: nn.Parameter, layout: Layout, rank: int) -> int:
    """Index of a rank's first value of a parameter in the whole parameter."""
    if not is_expert(name):
        return 0
    shape = local_shape(parameter)
    return layout.first_expert(rank) * (torch.Size(shape).numel() // shape[0])


def _replica_ranges(model: nn.Module, layout: Layout, rank: int) -> dict[str, range]:
    """The values of each parameter that a rank saves, if all its replicas hold all of them.

    The replicas divide all values of the dense parameters, and all of the experts, in order: few
    parameters are divided, and every rank saves about as many values.
    """
    ranges: dict[str, range] = {}
    for of_experts in (False, True):
        size = layout.expert_parallel_size if of_experts else 1
        replicas, replica = layout.world_size // size, rank // size
        parameters = [item for item in model.named_parameters() if is_expert(item[0]) == of_experts]
        total = sum(parameter.numel() for _, parameter in parameters)
        begin, end = total * replica // replicas, total * (replica + 1) // replicas
        offset = 0
        for name, parameter in parameters:
            first, last = max(begin, offset), min(end, offset + parameter.numel())
            ranges[name] = range(first - offset, max(first, last) - offset)
            offset += parameter.numel()
    return ranges


def buffer_fragments(model: nn.Module) -> Iterator[Fragment]:
    """The buffers of a model, which are equal on all ranks."""
    for name, buffer in model.named_buffers():
        yield Fragment(name, 0, {VALUE: buffer.detach().reshape(-1)})


def load_buffers(model: nn.Module, reader: StateReader) -> None:
    """Load the buffers of a model.

    Raises:
        CheckpointError: A value is missing.
    """
    for name, buffer in model.named_buffers():
        buffer.copy_(reader.read(name, VALUE, 0, buffer.numel()).view(buffer.shape))


def replicated_fragments(
    model: nn.Module, optimizer: torch.optim.Optimizer, layout: Layout, rank: int
) -> Iterator[Fragment]:
    """What a rank saves of parameters that all their replicas hold as a whole."""
    ranges = _replica_ranges(model, layout, rank)
    for name, parameter in model.named_parameters():
        part = ranges[name]
        if not part:
            continue
        state = optimizer.state.get(parameter, {})
        values = {WEIGHT: parameter} | {kind: state[kind] for kind in MOMENTS if kind in state}
        yield Fragment(
            name,
            first_value(name, parameter, layout, rank) + part.start,
            {kind: t.detach().reshape(-1)[part.start : part.stop] for kind, t in values.items()},
            steps=int(state.get("step", 0)),
        )


def load_replicated(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    layout: Layout,
    rank: int,
    reader: StateReader,
) -> None:
    """Load what `replicated_fragments` saves, or the same values from any other layout.

    Raises:
        CheckpointError: A value is missing.
    """
    load_weights(model, layout, rank, reader)
    for name, parameter in model.named_parameters():
        first = first_value(name, parameter, layout, rank)
        if steps := reader.steps(name):
            moments = {
                kind: reader.read(name, kind, first, parameter.numel()).view(parameter.shape)
                for kind in MOMENTS
            }
            optimizer.state[parameter] = adam_state(steps, moments, parameter.device)
        else:
            optimizer.state.pop(parameter, None)


def load_weights(model: nn.Module, layout: Layout, rank: int, reader: StateReader) -> None:
    """Load the weights of a module whose parameters are whole."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            first = first_value(name, parameter, layout, rank)
            weight = reader.read(name, WEIGHT, first, parameter.numel())
            parameter.copy_(weight.view(parameter.shape))


def adam_state(
    steps: int, moments: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """The state of torch's AdamW for one tensor."""
    # The fused optimizer reads the step count from the parameter's device.
    state = {"step": torch.tensor(float(steps), device=device)}
    return state | {kind: moment.to(device) for kind, moment in moments.items()}
