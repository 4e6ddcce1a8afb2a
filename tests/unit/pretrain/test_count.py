"""Counting from the config: equal to the model that is built, and to the published table of
sizes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config.experts import MoEConfig
from pretrain.config.presets import load_run
from pretrain.config.schema import ModelConfig, RunConfig
from pretrain.model.count import count_flops, count_parameters
from pretrain.model.vision_language import VisionLanguageModel, valid_positions


def _built(run: RunConfig) -> int:
    # "meta" gives every parameter a shape and no memory, so that the largest preset fits too.
    with torch.device("meta"):
        model = VisionLanguageModel(run.model, run.moe)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["tiny", "s16", "b16", "l16", "h14"])
def test_as_many_parameters_as_the_real_model(name: str) -> None:
    run = load_run(name)
    assert count_parameters(run.model, run.moe).total == _built(run)


@pytest.mark.parametrize(
    "overrides",
    [
        ["moe.shared_experts=0"],
        ["moe.shared_experts=3", "moe.expert_width=24"],
        ["moe.every=2"],
        ["moe.stop=3"],
        ["moe.start=4"],
        ["moe.start=0"],
        ["model.embed_dim=40", "model.pool_heads=2", "model.num_heads=8"],
        ["moe.router_input=caption"],
        ["moe.router_input=caption", "moe.stop=3"],
        ["model.stem=conv"],
        ["model.stem=conv", "model.width=48", "model.patch_size=16", "model.num_heads=2"],
    ],
)
def test_as_many_parameters_as_the_real_model_with_other_shapes(overrides: list[str]) -> None:
    run = load_run("tiny", ["model.vocab_size=512", *overrides])
    assert count_parameters(run.model, run.moe).total == _built(run)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        # The table says 1M for tiny: a rounded million.
        ("tiny", 1.03e6, 0.586e6),
        ("s16", 115e6, 21e6),
        ("b16", 462e6, 85e6),
        ("l16", 1.71e9, 304e6),
        ("h14", 3.62e9, 1.05e9),
    ],
)
def test_trunks_of_the_table_of_sizes(name: str, total: float, active: float) -> None:
    run = load_run(name)
    count = count_parameters(run.model, run.moe)
    assert count.trunk_total == pytest.approx(total, rel=0.02)
    assert count.trunk_active == pytest.approx(active, rel=0.02)


def test_active_leaves_out_exactly_the_experts_not_visited() -> None:
    model, moe = ModelConfig(), MoEConfig(num_experts=8, top_k=3, expert_width=64)
    count = count_parameters(model, moe)
    one_expert = 3 * model.width * moe.expert_width
    assert count.total - count.active == 3 * (8 - 3) * one_expert  # three sparse blocks
    every_expert = MoEConfig(num_experts=8, top_k=8, expert_width=64)
    assert count_parameters(model, every_expert).active == count.total


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["moe.start=4"],
        ["model.stem=conv"],
        ["moe.router_input=caption"],
        ["moe.top_k=8", "model.fusion_layer=1"],
    ],
)
def test_flops_of_the_forward_pass_that_torch_counts(overrides: list[str]) -> None:
    """Torch sees the products that are run, which differ from the formula in one known way."""
    run = load_run("tiny", ["model.vocab_size=1000", "moe.backend=loop", *overrides])
    model = VisionLanguageModel(run.model, run.moe)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    pairs, text = 2, 16
    lengths = torch.full((pairs,), text)
    # The counter knows plain products, not the fused attention of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(
            torch.zeros(pairs, 3, 48, 48, dtype=torch.uint8),
            torch.ones(pairs, text, dtype=torch.int64),
            lengths,
            valid_positions(lengths, text),
        )
    expected = count_flops(run.model, run.moe, text_tokens=text).forward
    # The counter takes causal attention for a full square; the formula counts the visible half.
    hidden = text * text - text * (text + 1) / 2
    expected += run.model.num_layers * 4 * run.model.width * hidden
    assert counter.get_total_flops() / pairs == pytest.approx(expected, rel=1e-4)


def test_training_is_three_forward_passes() -> None:
    flops = count_flops(ModelConfig(), MoEConfig(), text_tokens=10)
    assert flops.training == 3 * flops.forward > 0
