"""Which parameters decay, and clipping where DeepSpeed leaves it to us."""

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
from pretrain.parallel.deepspeed_engine import DeepSpeedEngine


def test_matrices_and_experts_decay_but_norms_embeddings_queries_and_the_temperature_do_not() -> (
    None
):
    model = VisionLanguageModel(ModelConfig(vocab_size=50, stem="conv"), MoEConfig())
    groups = parameter_groups(model, OptimConfig(weight_decay=0.3), "ep_size_2")
    home = {id(parameter): group for group in groups for parameter in group["params"]}
    assert (
        len(home) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    )
    found: dict[str, set[str]] = {group["name"]: set() for group in groups}
    for name, parameter in model.named_parameters():
        found[home[id(parameter)]["name"]].add(name)
    assert {group["name"]: group["weight_decay"] for group in groups} == {
        "dense": 0.3,
        "dense_without_decay": 0.0,
        "ep_size_2": 0.3,
    }
    plain = {name for name, _ in model.named_parameters() if "norm" in name}
    assert found["dense_without_decay"] == plain | {
        "text_embedding.weight",
        "image_head.query",
        "log_scale",
    }
    assert found["ep_size_2"] == {
        f"blocks.{block}.ffn.experts.w{n}" for block in (1, 2, 3) for n in (1, 2, 3)
    }
    assert [group["name"] for group in groups if group.get("moe")] == ["ep_size_2"]
    assert {
        "stem.convs.0.weight",
        "stem.out.weight",
        "blocks.1.ffn.gate.weight",
        "blocks.1.ffn.shared.down",
        "blocks.0.ffn.gate_up",
        "blocks.0.attention.qkv.weight",
        "image_head.out.weight",
    } <= found["dense"]


def test_a_dense_trunk_is_clipped_without_expert_groups() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    engine = SimpleNamespace(
        model=model, device=torch.device("cpu"), _clip_norm=1.0, _expert_group_name="ep_size_1"
    )
    norm = DeepSpeedEngine._clip_whole_gradients(cast(Any, engine))
    assert norm == pytest.approx(5.0)
    assert float(model.weight.grad.norm()) == pytest.approx(1.0, rel=1e-5)
