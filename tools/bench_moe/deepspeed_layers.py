"""DeepSpeed's two MoE layers in one process: `deepspeed.moe.layer.MoE` and AutoEP's layer."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.bench_moe.implementations import (
    Implementation,
    Unavailable,
    Weights,
    copy_weights,
    gradients_of,
)
from tools.bench_moe.shapes import Shape


def native(shape: Shape, weights: Weights) -> Implementation:
    """`deepspeed.moe.layer.MoE`, dropless, with SwiGLU experts that run one after another.

    Raises:
        Unavailable: DeepSpeed cannot be imported.
    """
    moe = _import("deepspeed.moe.layer", weights.w1.device).MoE
    layer = moe(
        shape.width,
        _SwiGLUExpert(shape.width, shape.hidden),
        num_experts=shape.experts,
        k=shape.k,
        min_capacity=0,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    layer = layer.to(weights.w1.device, weights.w1.dtype)
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(weights.router)
        for expert, w1, w2, w3 in zip(experts, weights.w1, weights.w2, weights.w3, strict=True):
            for parameter, weight in ((expert.w1, w1), (expert.w2, w2), (expert.w3, w3)):
                parameter[0].copy_(weight)

    def stacked_gradients(name: str) -> Tensor:
        return torch.cat([getattr(expert, name).grad for expert in experts])

    def gradients() -> Weights:
        return Weights(
            layer.deepspeed_moe.gate.wg.weight.grad,
            stacked_gradients("w1"),
            stacked_gradients("w2"),
            stacked_gradients("w3"),
        )

    return Implementation(layer, lambda x_TD: layer(x_TD)[0], gradients)


class _SwiGLUExpert(nn.Module):
    """One SwiGLU expert with weights `[1, out, in]`: one slice of `Weights`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(1, hidden, width))
        self.w2 = nn.Parameter(torch.empty(1, width, hidden))
        self.w3 = nn.Parameter(torch.empty(1, hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map the last dimension from `width` to `width`."""
        w1, w2, w3 = (weight[0].to(x.dtype) for weight in (self.w1, self.w2, self.w3))
        return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)


def auto_ep(shape: Shape, weights: Weights) -> Implementation:
    """AutoEP's layer, constructed from a Mixtral-style block as AutoEP does.

    Its grouped matrix product requires a GPU kernel; on CPU it loops over the experts.

    Raises:
        Unavailable: DeepSpeed cannot be imported.
    """
    device, dtype = weights.w1.device, weights.w1.dtype
    auto_ep_layer = _import("deepspeed.module_inject.auto_ep_layer", device)
    config = auto_ep_layer.AutoEPConfig(use_grouped_mm=device.type == "cuda")
    spec = auto_ep_layer.MoELayerSpec(
        moe_module_name="block",
        model_family="mixtral",
        router_name="gate",
        experts_name="experts",
        expert_storage="module_list",
        expert_w1_name="w1",
        expert_w2_name="w2",
        expert_w3_name="w3",
        num_experts=shape.experts,
        top_k=shape.k,
        hidden_size=shape.width,
        ffn_hidden_size=shape.hidden,
        score_func="softmax",
        score_apply="post",
        route_norm=True,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )
    with torch.device(device):
        block = _MixtralBlock(shape).to(dtype)
        layer = auto_ep_layer.AutoEPMoELayer(spec, block, ep_size=1, ep_rank=0, config=config)
        layer = layer.to(dtype)
    parameters = Weights(
        layer.router.gate.weight, layer.experts.w1, layer.experts.w2, layer.experts.w3
    )
    copy_weights(parameters, weights)
    return Implementation(
        layer, lambda x_TD: layer(x_TD.unsqueeze(0)).squeeze(0), lambda: gradients_of(parameters)
    )


class _MixtralBlock(nn.Module):
    """The block that AutoEP replaces: a gate, and experts with linear layers w1, w2, w3."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()

        def expert() -> nn.ModuleDict:
            return nn.ModuleDict(
                {
                    "w1": nn.Linear(shape.width, shape.hidden, bias=False),
                    "w2": nn.Linear(shape.hidden, shape.width, bias=False),
                    "w3": nn.Linear(shape.width, shape.hidden, bias=False),
                }
            )

        self.gate = nn.Linear(shape.width, shape.experts, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(shape.experts))


def _import(module: str, device: torch.device) -> Any:
    """Import a module that uses DeepSpeed; DeepSpeed reads DS_ACCELERATOR at import."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        imported: ModuleType = import_module(module)
    except ImportError as error:
        raise Unavailable(f"DeepSpeed cannot be imported: {error}") from error
    return imported
