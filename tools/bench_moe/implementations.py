"""The benchmarked layers: this project's MoE layer, a dense network, and their common interface.

All MoE layers have the same weights in the benchmarked dtype, are dropless, and route alike:
float32 softmax over the experts, top-k, weights normalized to sum to one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.moe.layer import MoELayer, SwiGLU
from pretrain.moe.tokens import TokenBatch
from tools.bench_moe.shapes import UNEVEN, Shape


class Unavailable(Exception):
    """An implementation cannot run on this machine; the message gives the reason."""


class Weights(NamedTuple):
    """Weights of one MoE layer, or their gradients."""

    router: Tensor
    """`[experts, width]`"""
    w1: Tensor
    """Gate, `[experts, hidden, width]`."""
    w2: Tensor
    """Down, `[experts, width, hidden]`."""
    w3: Tensor
    """Up, `[experts, hidden, width]`."""


class Implementation(NamedTuple):
    """A layer to benchmark."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    """Maps tokens `[tokens, width]` to outputs of the same shape."""
    gradients: Callable[[], Weights] | None
    """Stacked weight gradients after a backward pass; None for a layer with other weights."""

    def run(self, x_TD: Tensor, grad_TD: Tensor) -> Tensor:
        """Forward and backward pass; returns the output, sets `x_TD.grad`."""
        x_TD.grad = None
        self.module.zero_grad(set_to_none=True)
        y_TD = self.forward(x_TD)
        torch.autograd.backward(y_TD, grad_TD)
        return y_TD


def sample_weights(shape: Shape, device: torch.device, dtype: torch.dtype) -> Weights:
    """Random weights with standard deviation 1 / sqrt(inputs), the same for the same shape."""
    generator = torch.Generator(device).manual_seed(1)

    def sample(*size: int) -> Tensor:
        values = torch.randn(*size, generator=generator, device=device)
        return (values / math.sqrt(size[-1])).to(dtype)

    return Weights(
        sample(shape.experts, shape.width),
        sample(shape.experts, shape.hidden, shape.width),
        sample(shape.experts, shape.width, shape.hidden),
        sample(shape.experts, shape.hidden, shape.width),
    )


TARGET_LOGIT = 12.0
"""Logit added for the sampled experts. Logits of the others are noise with standard deviation 1,
whose maximum over millions of values is about 5."""


def sample_tokens(shape: Shape, weights: Weights) -> tuple[Tensor, Tensor]:
    """Random tokens `[tokens, width]` and a gradient of the output.

    Each token has k experts, sampled according to the shape's load, whose logits are so much larger
    than the others' that every implementation selects them regardless of rounding. An even load
    favors layers that pad all experts to the busiest one.
    """
    device, dtype = weights.router.device, weights.router.dtype
    generator = torch.Generator(device).manual_seed(2)
    uniform_TE = torch.rand(shape.tokens, shape.experts, generator=generator, device=device)
    probs_E = torch.ones(shape.experts, device=device)
    if shape.load == UNEVEN:
        probs_E = torch.arange(shape.experts, 0, -1, device=device) - 0.5

    # The top k of log probability + Gumbel noise are k samples without replacement (Kool et al.
    # 2019, arXiv:1903.06059).
    perturbed_TE = probs_E.log() - uniform_TE.clamp_min(1e-20).log().neg().log()
    experts_TK = perturbed_TE.topk(shape.k, dim=1).indices
    logits_TE = torch.zeros_like(perturbed_TE).scatter_(1, experts_TK, TARGET_LOGIT)
    router = weights.router.float()
    directions_ED = router / router.square().sum(dim=1, keepdim=True)
    noise_TD = torch.randn(shape.tokens, shape.width, generator=generator, device=device)
    x_TD = noise_TD + logits_TE @ directions_ED
    grad_TD = torch.randn(shape.tokens, shape.width, generator=generator, device=device)
    return x_TD.to(dtype).requires_grad_(), grad_TD.to(dtype)


def ours(shape: Shape, weights: Weights) -> Implementation:
    """`pretrain.moe.layer.MoELayer` as in training, with statistics; half of the tokens are
    patches."""
    config = MoEConfig(
        num_experts=shape.experts,
        top_k=shape.k,
        expert_width=shape.hidden,
        shared_experts=0,
    )
    device = weights.w1.device
    layer = MoELayer(shape.width, config, BalanceConfig()).to(device, weights.w1.dtype)
    parameters = Weights(layer.gate.weight, layer.experts.w1, layer.experts.w2, layer.experts.w3)
    copy_weights(parameters, weights)
    text = shape.tokens // 2
    tokens = TokenBatch(1, shape.tokens - text, text, torch.arange(text, device=device))
    return Implementation(
        layer, lambda x_TD: layer(x_TD, tokens)[0], lambda: gradients_of(parameters)
    )


def dense(shape: Shape, device: torch.device, dtype: torch.dtype) -> Implementation:
    """A dense SwiGLU network with the FLOPs per token of k experts."""
    layer = SwiGLU(shape.width, shape.k * shape.hidden).to(device, dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return Implementation(layer, layer, None)


def copy_weights(parameters: Weights, weights: Weights) -> None:
    """Copy `weights` into a layer's parameters."""
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)


def gradients_of(parameters: Weights) -> Weights:
    """Gradients of the parameters after a backward pass.

    Raises:
        AssertionError: A parameter has no gradient.
    """
    gradients: dict[str, Tensor] = {}
    for name, parameter in zip(Weights._fields, parameters, strict=True):
        if parameter.grad is None:
            raise AssertionError(f"no gradient for {name}")
        gradients[name] = parameter.grad
    return Weights(**gradients)
