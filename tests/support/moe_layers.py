"""Small MoE layers in float64 for tests, one for every routing option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.moe.layer import MoELayer

WIDTH = 16
LENGTHS, PATCHES = [3, 5, 1, 4], 4
"""Caption length of each pair, and number of patches per image, for `make_tokens`."""

OPTIONS: dict[str, dict[str, Any]] = {
    "top-1": {"num_experts": 4, "top_k": 1},
    "top-2 without shared expert": {"num_experts": 8, "top_k": 2, "shared_experts": 0},
    "all experts, raw weights": {"num_experts": 6, "top_k": 6, "norm_topk_prob": False},
    "sigmoid": {
        "num_experts": 8,
        "top_k": 3,
        "score_func": "sigmoid",
        "shared_experts": 2,
        "temperature": 2.0,
    },
    "sampled": {"num_experts": 8, "top_k": 2, "routing": "sampled"},
    "sampled sigmoid": {
        "num_experts": 8,
        "top_k": 2,
        "routing": "sampled",
        "score_func": "sigmoid",
    },
    "noisy": {
        "num_experts": 8,
        "top_k": 2,
        "routing": "noisy_top_k",
        "noise_std": 4.0,
        "temperature": 0.5,
    },
    "noisy with pools": {
        "num_experts": 6,
        "top_k": 2,
        "routing": "noisy_top_k",
        "pools": "modality",
    },
    "expert choice": {"num_experts": 4, "top_k": 2, "routing": "expert_choice"},
    "expert choice with pools": {
        "num_experts": 6,
        "top_k": 2,
        "routing": "expert_choice",
        "pools": "modality",
    },
    "pools": {"num_experts": 7, "top_k": 2, "pools": "modality", "image_experts": 5},
    "sigmoid with pools": {
        "num_experts": 6,
        "top_k": 2,
        "pools": "modality",
        "score_func": "sigmoid",
        "temperature": 1.7,
    },
    "capacity": {"num_experts": 4, "top_k": 2, "capacity_factor": 0.75},
    "capacity, random priority": {
        "num_experts": 4,
        "top_k": 2,
        "capacity_factor": 0.6,
        "capacity_priority": "random",
    },
    "capacity, batch priority": {
        "num_experts": 4,
        "top_k": 3,
        "capacity_factor": 0.5,
        "capacity_priority": "batch",
    },
    "capacity, batch priority, noisy": {
        "num_experts": 4,
        "top_k": 2,
        "routing": "noisy_top_k",
        "noise_std": 8.0,
        "capacity_factor": 0.5,
        "capacity_priority": "batch",
    },
    "capacity with pools": {
        "num_experts": 6,
        "top_k": 2,
        "capacity_factor": 0.7,
        "pools": "modality",
        "image_experts": 4,
        "capacity_priority": "batch",
    },
}


def parametrize_options(extra: dict[str, dict[str, Any]] | None = None) -> Any:
    """Run a test once for each routing option; the test gets its `settings`."""
    options = OPTIONS | (extra or {})
    return pytest.mark.parametrize("settings", list(options.values()), ids=list(options))


class Float64Router(torch.nn.Module):
    """The router in float64, so that a float64 layer can be compared with small tolerances."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach().clone())

    def forward(self, x_TD: Tensor | None = None) -> Tensor:
        """Return the logits; without tokens, the L1 norm of the weights, as `Router` does."""
        return self.weight.abs().sum() if x_TD is None else x_TD @ self.weight.t()


def make_layer(balance: dict[str, Any] | None = None, **settings: Any) -> MoELayer:
    """A layer in float64 with random parameters and biases."""
    torch.manual_seed(0)
    config = MoEConfig(**({"expert_width": 24} | settings))
    layer = MoELayer(WIDTH, config, BalanceConfig(**(balance or {})), block_index=3, fused=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer = layer.double()
    layer.gate = Float64Router(layer.gate.weight)  # type: ignore[assignment]
    if layer.bias is not None:
        layer.bias.value.normal_(std=0.1)
    return layer
