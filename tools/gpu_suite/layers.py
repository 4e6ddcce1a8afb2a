"""The layer's ways of routing that are checked on a GPU, with weights and tokens on which no
rounding decides."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.moe.layer import MoELayer
from pretrain.moe.noise import token_identity
from pretrain.moe.tokens import RouterTokens
from tools.bench_moe.arms import draw_tokens, draw_weights
from tools.bench_moe.shapes import Shape

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "usual": ({}, {}),
    "shared expert": ({"shared_experts": 1}, {}),
    "one expert a token": ({"top_k": 1}, {}),
    "sigmoid, biases": ({"score_func": "sigmoid"}, {"bias": "zscore", "bias_per_modality": True}),
    "capacity by position": ({"capacity_factor": 0.9}, {}),
    "capacity by chance": ({"capacity_factor": 1.1, "capacity_priority": "random"}, {}),
    "noisy, smooth load": ({"routing": "noisy_top_k"}, {"load_weight": 0.1}),
    "pools": ({"pools": "modality"}, {}),
    "caption gate": ({"router_input": "caption"}, {}),
}
"""Settings of moe and balance by name."""
OTHER_WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "experts choose patches": ({"routing": "expert_choice"}, {}),
    "sampled": ({"routing": "sampled"}, {}),
    "capacity by sureness": ({"capacity_factor": 1.1, "capacity_priority": "batch"}, {}),
    "sums of absolute weights": ({}, {"expert_l1_weight": 1e-4, "router_l1_weight": 1e-4}),
}
"""More, in which only waits of the host are looked for: in most of them near ties are usual, which
rounding decides."""


class Built(NamedTuple):
    """A layer with what it is given."""

    layer: MoELayer
    x_TD: Tensor
    grad_TD: Tensor
    tokens: RouterTokens

    def run(self) -> dict[str, Tensor]:
        """Forward and backward; outputs and all gradients by name."""
        self.x_TD.grad = None
        self.layer.zero_grad(set_to_none=True)
        y_TD, stats = self.layer(self.x_TD, self.tokens)
        # The statistics' gradient too: auxiliary losses are functions of these sums.
        sums = (
            stats.z_sum_M,
            stats.prob_sum_ME.square(),
            stats.load_sum_ME,
            stats.expert_l1,
            stats.router_l1,
        )
        extra = torch.stack([each.sum() for each in sums]).sum() * 1e-4
        torch.autograd.backward([y_TD, extra], [self.grad_TD, None])
        gradients = {name: parameter.grad for name, parameter in self.layer.named_parameters()}
        found = {"answers": y_TD.detach(), "gradient of the tokens": self.x_TD.grad, **gradients}
        return {name: value for name, value in found.items() if value is not None}


def build(way: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Built:
    """A layer and its tokens; the same numbers on every device, rounded to the type."""
    moe, balance = (WAYS | OTHER_WAYS)[way]
    given = {
        "num_experts": shape.experts,
        "top_k": shape.k,
        "expert_width": shape.hidden,
        "shared_experts": 0,
    }
    config = MoEConfig(**given | moe)
    layer = MoELayer(shape.width, config, BalanceConfig(**balance), fused=True)
    weights = draw_weights(shape, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * 0.5 / parameter.shape[-1] ** 0.5
            )
        layer.gate.weight.copy_(weights.router)
    # Towards as many experts as are chosen: of several that a token leans to equally, rounding
    # would choose.
    x_TD, grad_TD = draw_tokens(shape._replace(k=config.top_k), weights)
    layer = layer.to(device, dtype)
    x_TD = x_TD.detach().to(device, dtype).requires_grad_()
    return Built(layer, x_TD, grad_TD.to(device, dtype), tokens_of(shape, device))


def tokens_of(shape: Shape, device: torch.device) -> RouterTokens:
    """Half patches, half text, four pairs."""
    pairs, text = 4, shape.tokens // 8
    patches = shape.tokens // 4 - text
    positions = torch.arange(pairs * text)
    identity = token_identity(torch.arange(pairs), patches, positions, text)
    groups = torch.cat(
        [torch.arange(pairs).repeat_interleave(count) // 2 for count in (patches, text)]
    )
    return RouterTokens(
        pairs, patches, text, positions.to(device), identity.to(device), groups.to(device), 2, 7
    )
