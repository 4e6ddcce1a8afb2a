"""Parameter groups, and gradient clipping outside of DeepSpeed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from pretrain.config.experts import MoEConfig
from pretrain.config.schema import ModelConfig, OptimConfig
from pretrain.model.vision_language import VisionLanguageModel
from pretrain.optim.groups import parameter_groups
from pretrain.parallel.communicator import LocalCommunicator
from pretrain.parallel.deepspeed_engine import DeepSpeedEngine


def test_parameter_groups() -> None:
    model = VisionLanguageModel(ModelConfig(vocab_size=50, stem="conv"), MoEConfig())
    groups = parameter_groups(model, OptimConfig(weight_decay=0.3), "ep_size_2")
    group_of = {id(parameter): group["name"] for group in groups for parameter in group["params"]}
    num_grouped = sum(len(group["params"]) for group in groups)
    assert len(group_of) == num_grouped == len(list(model.parameters()))

    names: dict[str, set[str]] = {group["name"]: set() for group in groups}
    for name, parameter in model.named_parameters():
        names[group_of[id(parameter)]].add(name)

    assert {group["name"]: group["weight_decay"] for group in groups} == {
        "dense": 0.3,
        "dense_without_decay": 0.0,
        "ep_size_2": 0.3,
    }
    assert [group["name"] for group in groups if group.get("moe")] == ["ep_size_2"]

    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    assert names["dense_without_decay"] == norms | {
        "text_embedding.weight",
        "image_head.query",
        "log_scale",
    }
    assert names["ep_size_2"] == {
        f"blocks.{block}.ffn.experts.w{n}" for block in (1, 2, 3) for n in (1, 2, 3)
    }
    assert {
        "stem.convs.0.weight",
        "stem.out.weight",
        "blocks.1.ffn.gate.weight",
        "blocks.1.ffn.shared.down",
        "blocks.0.ffn.gate_up",
        "blocks.0.attention.qkv.weight",
        "image_head.out.weight",
    } <= names["dense"]


def test_gradient_clipping_of_a_dense_model() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    engine = SimpleNamespace(
        model=model,
        communicator=LocalCommunicator(torch.device("cpu")),
        _clip_norm=1.0,
        _expert_group_name="ep_size_1",
    )
    norm = DeepSpeedEngine._clip_by_global_norm(cast(Any, engine))
    assert norm == pytest.approx(5.0)
    assert float(model.weight.grad.norm()) == pytest.approx(1.0, rel=1e-5)
