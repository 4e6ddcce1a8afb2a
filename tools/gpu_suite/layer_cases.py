"""MoE layers with different routing settings, with inputs for which rounding does not change the
assignment of tokens to experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.moe.layer import MoELayer
from pretrain.moe.noise import hash_tokens
from pretrain.moe.tokens import TokenBatch
from tools.bench_moe.implementations import sample_tokens, sample_weights
from tools.bench_moe.shapes import Shape

Settings = tuple[dict[str, Any], dict[str, Any]]
"""Settings of `moe` and of `balance`."""

ROUTING_CASES: dict[str, Settings] = {
    "default": ({}, {}),
    "shared expert": ({"shared_experts": 1}, {}),
    "top-1": ({"top_k": 1}, {}),
    "sigmoid, biases": ({"score_func": "sigmoid"}, {"bias": "zscore", "bias_per_modality": True}),
    "capacity, token order": ({"capacity_factor": 0.9}, {}),
    "capacity, random order": ({"capacity_factor": 1.1, "capacity_priority": "random"}, {}),
    "noisy top-k, load loss": ({"routing": "noisy_top_k"}, {"load_weight": 0.1}),
    "modality pools": ({"pools": "modality"}, {}),
    "caption router input": ({"router_input": "caption"}, {}),
}
"""Cases whose numerics are compared."""
SYNC_ONLY_CASES: dict[str, Settings] = {
    "expert choice": ({"routing": "expert_choice"}, {}),
    "sampled": ({"routing": "sampled"}, {}),
    "capacity, score order": ({"capacity_factor": 1.1, "capacity_priority": "batch"}, {}),
    "L1 losses": ({}, {"expert_l1_weight": 1e-4, "router_l1_weight": 1e-4}),
}
"""Cases that are only checked for host synchronization: in most of them scores are nearly tied, so
rounding changes assignments."""


class LayerCase(NamedTuple):
    """A layer with its input."""

    layer: MoELayer
    x_TD: Tensor
    grad_TD: Tensor
    tokens: TokenBatch

    def run(self) -> dict[str, Tensor]:
        """Forward and backward pass; returns the output and all gradients by name."""
        self.x_TD.grad = None
        self.layer.zero_grad(set_to_none=True)
        y_TD, stats = self.layer(self.x_TD, self.tokens)
        # Auxiliary losses are functions of these sums, so their gradients are included.
        sums = (
            stats.z_sum_M,
            stats.prob_sum_ME.square(),
            stats.load_sum_ME,
            stats.expert_l1,
            stats.router_l1,
        )
        loss = torch.stack([value.sum() for value in sums]).sum() * 1e-4
        torch.autograd.backward([y_TD, loss], [self.grad_TD, None])

        tensors = {"output": y_TD.detach(), "input gradient": self.x_TD.grad}
        tensors |= {name: parameter.grad for name, parameter in self.layer.named_parameters()}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def build(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> LayerCase:
    """Build a case: the same values on every device, rounded to `dtype`."""
    moe, balance = (ROUTING_CASES | SYNC_ONLY_CASES)[name]
    defaults: dict[str, Any] = {
        "num_experts": shape.experts,
        "top_k": shape.k,
        "expert_width": shape.hidden,
        "shared_experts": 0,
    }
    config = MoEConfig(**defaults | moe)
    layer = MoELayer(shape.width, config, BalanceConfig(**balance), fused=True)
    weights = sample_weights(shape, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * 0.5 / parameter.shape[-1] ** 0.5)
        layer.gate.weight.copy_(weights.router)

    # As many experts with a high logit as are selected: among more of them with equal logits,
    # rounding would decide.
    x_TD, grad_TD = sample_tokens(shape._replace(k=config.top_k), weights)
    layer = layer.to(device, dtype)
    x_TD = x_TD.detach().to(device, dtype).requires_grad_()
    return LayerCase(layer, x_TD, grad_TD.to(device, dtype), _token_batch(shape, device))


def _token_batch(shape: Shape, device: torch.device) -> TokenBatch:
    """Four pairs in two capacity groups; half of the tokens are patches, half text."""
    pairs, text = 4, shape.tokens // 8
    patches = shape.tokens // 4 - text
    positions = torch.arange(pairs * text)
    hashes = hash_tokens(torch.arange(pairs), patches, positions, text)
    groups = torch.cat(
        [torch.arange(pairs).repeat_interleave(count) // 2 for count in (patches, text)]
    )
    return TokenBatch(
        num_pairs=pairs,
        num_patches=patches,
        context_length=text,
        text_positions=positions.to(device),
        token_hash_T=hashes.to(device),
        group_T=groups.to(device),
        num_groups=2,
        step_seed=7,
    )
