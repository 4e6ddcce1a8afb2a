"""First values of the parameters: drawn by name, so that no layout changes them.

Every tensor has its own generator, seeded by the run's seed and the parameter's name, and each
expert one of its own, seeded by its global number: expert 5 starts the same whether one rank holds
all experts or eight ranks hold a slice each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from data_pipeline.common.seeds import named_seed


def initialize(model: nn.Module, *, seed: int, num_layers: int, first_expert: int = 0) -> None:
    """Fill all parameters of `model` in place.

    Matrices are normal with deviation 1/sqrt(inputs); those that write to the residual stream are
    smaller by sqrt(2 x blocks) (GPT-2). Router rows are small, so that routing starts nearly even.
    Embeddings have deviation 0.02 and norms are one.

    Args:
        model: A model on CPU in float32.
        seed: The run's seed.
        num_layers: Blocks of the trunk.
        first_expert: Global number of the first expert that this rank holds.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill_parameter(name, parameter, seed, num_layers, first_expert)


def fill_parameter(
    name: str, parameter: Tensor, seed: int, num_layers: int, first_expert: int
) -> None:
    """Give one parameter its first value, by the role its name tells."""
    residual_scale = 1.0 / math.sqrt(2 * num_layers)
    leaf = name.rsplit(".", 1)[-1]
    if ".experts." in name:
        deviation = _fan_in_deviation(parameter) * (residual_scale if leaf == "w2" else 1.0)
        for local, expert in enumerate(parameter):
            _normal(expert, deviation, named_seed(seed, "init", name, first_expert + local))
    elif "norm" in name and parameter.dim() == 1:
        parameter.fill_(1.0)
    elif name == "log_scale":
        return  # set by the model from its configuration
    else:
        _normal(
            parameter, _deviation(name, parameter, residual_scale), named_seed(seed, "init", name)
        )


def _deviation(name: str, parameter: Tensor, residual_scale: float) -> float:
    if name.startswith("text_embedding") or parameter.dim() == 1:
        return 0.02
    if ".gate." in name or ".caption_gate." in name:
        return 0.1 * _fan_in_deviation(parameter)
    writes_residual = name.endswith(("attention.out.weight", ".down"))
    return _fan_in_deviation(parameter) * (residual_scale if writes_residual else 1.0)


def _fan_in_deviation(parameter: Tensor) -> float:
    # Experts are stacked, [experts, out, in]; a convolution is [out, in, 3, 3].
    inputs = parameter[0].numel() if parameter.dim() == 4 else parameter.shape[-1]
    return 1.0 / math.sqrt(inputs)


def _normal(tensor: Tensor, deviation: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor.copy_(torch.randn(tensor.shape, generator=generator) * deviation)
