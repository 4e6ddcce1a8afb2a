"""torchtitan's MoE layer, if it is installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from tools.bench_moe.implementations import (
    Implementation,
    Unavailable,
    Weights,
    copy_weights,
    gradients_of,
)
from tools.bench_moe.shapes import Shape


def torchtitan(shape: Shape, weights: Weights) -> Implementation:
    """`torchtitan.models.common.moe.MoE`: softmax, normalized weights, no bias, no shared expert.

    Raises:
        Unavailable: It cannot be imported, or the dtype is not bfloat16, in which its experts
            always compute.
    """
    device, dtype = weights.w1.device, weights.w1.dtype
    if dtype != torch.bfloat16:
        raise Unavailable("torchtitan's experts always compute in bfloat16")
    try:
        moe: Any = import_module("torchtitan.models.common.moe")
        linear: Any = import_module("torchtitan.models.common.linear")
        dispatch: Any = import_module("torchtitan.models.common.token_dispatcher")
    except ImportError as error:
        raise Unavailable(f"torchtitan's MoE layer cannot be imported: {error}") from error

    experts = moe.GroupedExperts.Config(
        dim=shape.width, hidden_dim=shape.hidden, num_experts=shape.experts
    )
    dispatcher = dispatch.LocalTokenDispatcher.Config(num_experts=shape.experts, top_k=shape.k)
    gate = linear.Linear.Config(in_features=shape.width, out_features=shape.experts)
    config = moe.MoE.Config(
        num_experts=shape.experts,
        routed_experts=moe.RoutedExperts.Config(inner_experts=experts, token_dispatcher=dispatcher),
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=shape.experts,
            gate=gate,
            top_k=shape.k,
            score_func="softmax",
            route_norm=True,
        ),
        load_balance_coeff=None,
    )
    layer = config.build().to(device, dtype)
    inner = layer.routed_experts.inner_experts
    parameters = Weights(layer.router.gate.weight, inner.w1_EFD, inner.w2_EDF, inner.w3_EFD)
    copy_weights(parameters, weights)
    return Implementation(
        layer, lambda x_TD: layer(x_TD.unsqueeze(0)).squeeze(0), lambda: gradients_of(parameters)
    )
