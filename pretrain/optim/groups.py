"""Parameter groups of the optimizer: dense with weight decay, dense without, and experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pretrain.config.schema import OptimConfig


def is_expert(name: str) -> bool:
    """Whether a parameter, given by its name in the model, belongs to the routed experts."""
    return ".experts." in name


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, but not to norms, embeddings, pooling queries and
    the contrastive scale."""
    return parameter.dim() >= 2 and not name.startswith("text_embedding")


def parameter_groups(
    model: nn.Module, optim: OptimConfig, expert_group_name: str
) -> list[dict[str, Any]]:
    """Split the parameters into dense with weight decay, dense without, and experts.

    DeepSpeed recognizes parameters that differ between ranks by the key `moe` of their group and by
    the group's name, which is that of the expert-parallel process group.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    experts: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if is_expert(name):
            experts.append(parameter)
        elif has_weight_decay(name, parameter):
            decay.append(parameter)
        else:
            no_decay.append(parameter)

    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": optim.weight_decay, "name": "dense"},
        {"params": no_decay, "weight_decay": 0.0, "name": "dense_without_decay"},
    ]
    if experts:
        groups.append(
            {
                "params": experts,
                "weight_decay": optim.weight_decay,
                "name": expert_group_name,
                "moe": True,
            }
        )
    return groups


def build_adamw(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `groups`, fused on GPU (Loshchilov and Hutter 2019, arXiv:1711.05101)."""
    fused = any(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(
        groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused or None
    )
