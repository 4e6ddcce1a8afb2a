"""DeepSpeed's two MoE layers as contestants: `deepspeed.moe.layer.MoE`, and that of AutoEP, in one
process."""

from __future__ import annotations

import logging
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tools.bench_moe.arms import Arm, Missing, Weights, copy, gradients_of
from tools.bench_moe.shapes import Shape


def native(shape: Shape, weights: Weights) -> Arm:
    """`deepspeed.moe.layer.MoE`, dropless; its experts are gated networks of our shape, run one by
    one."""
    layers = _deepspeed("pretrain.parallel.deepspeed_native_moe", weights.w1.device)
    layer = layers.native_layer(shape.width, shape.hidden, shape.experts, shape.k)
    layer = layer.to(weights.w1.device, weights.w1.dtype)
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(weights.router)
        for expert, w1, w2, w3 in zip(experts, weights.w1, weights.w2, weights.w3, strict=True):
            for parameter, weight in ((expert.w1, w1), (expert.w2, w2), (expert.w3, w3)):
                parameter[0].copy_(weight)

    def stacked(name: str) -> Tensor:
        return torch.cat([getattr(expert, name).grad for expert in experts])

    def gradients() -> Weights:
        return Weights(
            layer.deepspeed_moe.gate.wg.weight.grad, stacked("w1"), stacked("w2"), stacked("w3")
        )

    return Arm(layer, lambda x_TD: layer(x_TD)[0], gradients)


def auto_ep(shape: Shape, weights: Weights) -> Arm:
    """AutoEP's layer, made from a block of the usual form as AutoEP would.

    Its grouped product goes with a kernel that only GPUs have, so on CPU it is its loop over the
    experts.
    """
    device, dtype = weights.w1.device, weights.w1.dtype
    theirs = _deepspeed("deepspeed.module_inject.auto_ep_layer", device)
    config = theirs.AutoEPConfig(use_grouped_mm=device.type == "cuda")
    spec = theirs.MoELayerSpec(
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
        block = _Block(shape).to(dtype)
        layer = theirs.AutoEPMoELayer(spec, block, ep_size=1, ep_rank=0, config=config).to(dtype)
    parameters = Weights(
        layer.router.gate.weight, layer.experts.w1, layer.experts.w2, layer.experts.w3
    )
    copy(parameters, weights)
    return Arm(
        layer, lambda x_TD: layer(x_TD.unsqueeze(0)).squeeze(0), lambda: gradients_of(parameters)
    )


class _Block(nn.Module):
    """What AutoEP replaces: a gate, and a list of experts with linear maps w1, w2, w3."""

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


def _deepspeed(module: str, device: torch.device) -> Any:
    """A module that needs DeepSpeed, which wants its accelerator chosen before it is imported."""
    from importlib import import_module

    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        found: ModuleType = import_module(module)
    except ImportError as error:
        raise Missing(f"DeepSpeed cannot be imported: {error}") from error
    return found
