"""Names of model tensors in comparisons of engines.

A tensor has the name of its parameter or buffer in the module. Experts that are stacked in one
tensor are split over ranks: the slice of a rank is named `NAME@first:last`, the half-open range of
global expert indices.
"""

from __future__ import annotations

from pretrain.optim.groups import is_expert
from pretrain.parallel.layout import Layout

BIAS_SUFFIX = ".bias.value"
"""Suffix of the names of expert biases (`pretrain.moe.bias.ExpertBias` in `MoELayer.bias`)."""


def tensor_name(parameter_name: str, layout: Layout, rank: int) -> str:
    """The name of a rank's parameter: with the range of its experts, if it holds experts."""
    if not is_expert(parameter_name):
        return parameter_name
    return slice_name(parameter_name, layout.first_expert(rank), layout.experts_per_rank)


def slice_name(name: str, first: int, count: int) -> str:
    """The name of a slice of `count` experts from `first` on."""
    return f"{name}@{first}:{first + count}"


def split_name(name: str) -> tuple[str, tuple[int, int] | None]:
    """The name without the range of experts, and that range (first, end); None without one."""
    plain, separator, span = name.partition("@")
    if not separator:
        return plain, None
    first, end = map(int, span.split(":"))
    return plain, (first, end)
