"""Parameter initialization that does not depend on the parallel layout.

Every tensor is sampled from its own generator, seeded by the run's seed and the parameter's name.
Each expert has a separate generator, seeded by its global index in addition: expert 5 is
initialized the same whether one rank holds all experts or eight ranks hold a slice each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from data_pipeline.common.seeds import named_seed


def initialize(model: nn.Module, *, seed: int, num_layers: int, first_expert: int = 0) -> None:
    """Initialize all parameters of `model` in place.

    Matrices are normal with standard deviation 1/sqrt(fan-in); those that write to the residual
    stream are scaled by 1/sqrt(2 x num_layers) (GPT-2). Router weights are scaled by 0.1, so that
    routing starts nearly uniform. Embeddings and vectors have standard deviation 0.02, and norm
    weights are one.

    Args:
        model: A model on CPU in float32.
        seed: The run's seed.
        num_layers: Blocks of the trunk.
        first_expert: Global index of the first expert on this rank.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            initialize_parameter(name, parameter, seed, num_layers, first_expert)


def initialize_parameter(
    name: str, parameter: Tensor, seed: int, num_layers: int, first_expert: int
) -> None:
    """Initialize one parameter according to its name."""
    residual_scale = 1.0 / math.sqrt(2 * num_layers)
    if ".experts." in name:
        is_down_projection = name.rsplit(".", 1)[-1] == "w2"
        std = _fan_in_std(parameter) * (residual_scale if is_down_projection else 1.0)
        for local_index, expert in enumerate(parameter):
            _normal(expert, std, named_seed(seed, "init", name, first_expert + local_index))
    elif "norm" in name and parameter.dim() == 1:
        parameter.fill_(1.0)
    elif name == "log_scale":
        return  # set by the model from its configuration
    else:
        std = _dense_std(name, parameter, residual_scale)
        _normal(parameter, std, named_seed(seed, "init", name))


def _dense_std(name: str, parameter: Tensor, residual_scale: float) -> float:
    if name.startswith("text_embedding") or parameter.dim() == 1:
        return 0.02
    if ".gate." in name or ".caption_gate." in name:
        return 0.1 * _fan_in_std(parameter)
    writes_residual = name.endswith(("attention.out.weight", ".down"))
    return _fan_in_std(parameter) * (residual_scale if writes_residual else 1.0)


def _fan_in_std(parameter: Tensor) -> float:
    # Experts are stacked, [experts, out, in]; a convolution is [out, in, 3, 3].
    fan_in = parameter[0].numel() if parameter.dim() == 4 else parameter.shape[-1]
    return 1.0 / math.sqrt(fan_in)


def _normal(tensor: Tensor, std: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
