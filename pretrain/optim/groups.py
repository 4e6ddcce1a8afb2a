"""Which parameters decay and which are experts: the groups of the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pretrain.config.schema import OptimConfig


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to the routed experts, by its name in the model."""
    return ".experts." in name


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, but not to norms, embeddings, queries and the
    temperature."""
    return parameter.dim() >= 2 and not name.startswith("text_embedding")


def parameter_groups(
    model: nn.Module, optim: OptimConfig, expert_group_name: str
) -> list[dict[str, Any]]:
    """Split the parameters into dense-with-decay, dense-without-decay and experts.

    Experts are a group of their own, marked `moe` and named after their expert-parallel group,
    which is how DeepSpeed recognizes parameters that are not the same on every rank.
    """
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    experts: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        target = experts if is_expert(name) else decay if decays(name, parameter) else plain
        target.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": optim.weight_decay, "name": "dense"},
        {"params": plain, "weight_decay": 0.0, "name": "dense_without_decay"},
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
    """AdamW over `groups` (Loshchilov and Hutter 2019, arXiv:1711.05101), fused on GPU."""
    fused = any(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(
        groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused or None
    )
