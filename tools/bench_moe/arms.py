"""The contestants: one MoE layer each, with the same weights, dropless, and a dense network beside
them.

Every arm holds all of its weights in the type that is measured and routes alike: float32 softmax
over the experts, the best k, weights that sum to one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.moe.layer import MoELayer, SwiGLU
from pretrain.moe.tokens import RouterTokens
from tools.bench_moe.shapes import UNEVEN, Shape


class Missing(Exception):
    """An arm cannot be had here; the message says why."""


class Weights(NamedTuple):
    """Of one MoE layer."""

    router: Tensor
    """`[experts, width]`"""
    w1: Tensor
    """Gate, `[experts, hidden, width]`."""
    w2: Tensor
    """Down, `[experts, width, hidden]`."""
    w3: Tensor
    """Up, `[experts, hidden, width]`."""


class Arm(NamedTuple):
    """A layer under test."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    """From tokens `[tokens, width]` to the same shape."""
    gradients: Callable[[], Weights] | None
    """Of the weights after a backward pass, stacked; None for what has other weights."""

    def run(self, x_TD: Tensor, grad_TD: Tensor) -> Tensor:
        """Forward and backward; returns the answers, and leaves the gradient of the tokens in
        `x_TD.grad`."""
        x_TD.grad = None
        self.module.zero_grad(set_to_none=True)
        y_TD = self.forward(x_TD)
        torch.autograd.backward(y_TD, grad_TD)
        return y_TD


def draw_weights(shape: Shape, device: torch.device, dtype: torch.dtype) -> Weights:
    """Weights with deviation 1 / sqrt(inputs), the same for the same shape."""
    generator = torch.Generator(device).manual_seed(1)

    def draw(*size: int) -> Tensor:
        values = torch.randn(*size, generator=generator, device=device)
        return (values / math.sqrt(size[-1])).to(dtype)

    return Weights(
        draw(shape.experts, shape.width),
        draw(shape.experts, shape.hidden, shape.width),
        draw(shape.experts, shape.width, shape.hidden),
        draw(shape.experts, shape.hidden, shape.width),
    )


CLEAR = 12.0
"""Logit of a chosen expert; of the others' noise, which has deviation 1, the largest of millions is
about 5."""


def draw_tokens(shape: Shape, weights: Weights) -> tuple[Tensor, Tensor]:
    """Tokens `[tokens, width]` and the gradient of their answers.

    Each token leans towards k experts drawn by the chances of the shape's load, so clearly that
    every arm chooses the same ones however it rounds. Even chances favour layers that pad all
    experts to the fullest one.
    """
    device, dtype = weights.router.device, weights.router.dtype
    generator = torch.Generator(device).manual_seed(2)
    uniform_TE = torch.rand(shape.tokens, shape.experts, generator=generator, device=device)
    chances_E = torch.ones(shape.experts, device=device)
    if shape.load == UNEVEN:
        chances_E = torch.arange(shape.experts, 0, -1, device=device) - 0.5
    # The largest k of log chance + Gumbel noise are k draws without replacement (Kool et al. 2019,
    # arXiv:1903.06059).
    lots_TE = chances_E.log() - uniform_TE.clamp_min(1e-20).log().neg().log()
    chosen_TE = torch.zeros_like(lots_TE).scatter_(1, lots_TE.topk(shape.k, dim=1).indices, CLEAR)
    router = weights.router.float()
    towards_ED = router / router.square().sum(dim=1, keepdim=True)
    x_TD = (
        torch.randn(shape.tokens, shape.width, generator=generator, device=device)
        + chosen_TE @ towards_ED
    )
    grad_TD = torch.randn(shape.tokens, shape.width, generator=generator, device=device)
    return x_TD.to(dtype).requires_grad_(), grad_TD.to(dtype)


def ours(shape: Shape, weights: Weights) -> Arm:
    """`pretrain.moe.layer.MoELayer` as a run uses it, statistics included; half of the tokens are
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
    copy(parameters, weights)
    text = shape.tokens // 2
    tokens = RouterTokens(1, shape.tokens - text, text, torch.arange(text, device=device))
    return Arm(layer, lambda x_TD: layer(x_TD, tokens)[0], lambda: gradients_of(parameters))


def dense(shape: Shape, device: torch.device, dtype: torch.dtype) -> Arm:
    """One SwiGLU network that costs each token as many FLOPs as its k experts do."""
    layer = SwiGLU(shape.width, shape.k * shape.hidden).to(device, dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return Arm(layer, layer, None)


def copy(parameters: Weights, weights: Weights) -> None:
    """Give a layer its weights."""
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)


def gradients_of(parameters: Weights) -> Weights:
    """What a backward pass left."""
    found = [parameter.grad for parameter in parameters]
    missing = [
        name for name, gradient in zip(Weights._fields, found, strict=True) if gradient is None
    ]
    if missing:
        raise AssertionError(f"no gradient for {', '.join(missing)}")
    return Weights(*(gradient for gradient in found if gradient is not None))
