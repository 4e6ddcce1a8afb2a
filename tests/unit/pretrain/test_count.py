"""Parameter and FLOP counts against real models and the documented model sizes."""

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


def parameters_of_the_model(run: RunConfig) -> int:
    # Parameters on "meta" have no memory, so the largest preset can be built too.
    with torch.device("meta"):
        model = VisionLanguageModel(run.model, run.moe)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["tiny", "s16", "b16", "l16", "h14"])
def test_parameters_of_presets(name: str) -> None:
    run = load_run(name)
    assert count_parameters(run.model, run.moe).total == parameters_of_the_model(run)


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
def test_parameters_of_other_shapes(overrides: list[str]) -> None:
    run = load_run("tiny", ["model.vocab_size=512", *overrides])
    assert count_parameters(run.model, run.moe).total == parameters_of_the_model(run)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        # Documented as 1M, rounded.
        ("tiny", 1.03e6, 0.586e6),
        ("s16", 115e6, 21e6),
        ("b16", 462e6, 85e6),
        ("l16", 1.71e9, 304e6),
        ("h14", 3.62e9, 1.05e9),
    ],
)
def test_documented_trunk_sizes(name: str, total: float, active: float) -> None:
    run = load_run(name)
    count = count_parameters(run.model, run.moe)
    assert count.trunk_total == pytest.approx(total, rel=0.02)
    assert count.trunk_active == pytest.approx(active, rel=0.02)


def test_active_excludes_unassigned_experts() -> None:
    model, moe = ModelConfig(), MoEConfig(num_experts=8, top_k=3, expert_width=64)
    count = count_parameters(model, moe)
    one_expert = 3 * model.width * moe.expert_width
    assert count.total - count.active == 3 * (8 - 3) * one_expert  # three sparse blocks
    all_active = MoEConfig(num_experts=8, top_k=8, expert_width=64)
    assert count_parameters(model, all_active).active == count.total


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
def test_forward_flops_equal_those_counted_by_torch(overrides: list[str]) -> None:
    """Torch counts the matrix products that it runs; the formula leaves out masked attention."""
    run = load_run("tiny", ["model.vocab_size=1000", "moe.backend=loop", *overrides])
    model = VisionLanguageModel(run.model, run.moe)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    pairs, text_tokens = 2, 16
    lengths = torch.full((pairs,), text_tokens)
    text_ids = torch.ones(pairs, text_tokens, dtype=torch.int64)
    # The counter does not support the fused attention kernel of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(
            torch.zeros(pairs, 3, 48, 48, dtype=torch.uint8),
            text_ids,
            lengths,
            model.token_batch(text_ids, valid_positions(lengths, text_tokens)),
        )
    expected = count_flops(run.model, run.moe, text_tokens=text_tokens).forward
    # The counter includes the masked half of causal attention; the formula does not.
    masked = text_tokens * text_tokens - text_tokens * (text_tokens + 1) / 2
    expected += run.model.num_layers * 4 * run.model.width * masked
    assert counter.get_total_flops() / pairs == pytest.approx(expected, rel=1e-4)


def test_training_flops() -> None:
    flops = count_flops(ModelConfig(), MoEConfig(), text_tokens=10)
    assert flops.training == 3 * flops.forward > 0
