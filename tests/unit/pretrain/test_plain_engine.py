"""Gradient norm and clipping of the reference engine, compared with float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pretrain.config.experts import MoEConfig
from pretrain.config.schema import ModelConfig, OptimConfig, RunConfig
from pretrain.model import build_model
from pretrain.parallel.layout import Layout
from pretrain.parallel.plain_engine import PlainEngine, clip_gradients

RUN = RunConfig(
    model=ModelConfig(
        width=32,
        num_layers=2,
        num_heads=2,
        pool_heads=2,
        ffn_width=48,
        fusion_layer=1,
        image_size=16,
        patch_size=8,
        vocab_size=50,
        context_length=8,
        embed_dim=16,
    ),
    moe=MoEConfig(num_experts=4, expert_width=16),
)


def engine(optim: OptimConfig) -> PlainEngine:
    layout = Layout(
        world_size=1, expert_parallel_size=1, zero_stage=-1, precision="fp32", num_experts=4
    )
    return PlainEngine(build_model(RUN), optim, layout, torch.device("cpu"))


def exact_norm(gradients: list[Tensor]) -> float:
    return sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5


@pytest.mark.parametrize("large", [True, False])
def test_norm_of_large_tensors_is_accurate(large: bool) -> None:
    """torch's float32 sum has a relative error of 3e-4 here."""
    torch.manual_seed(0)
    gradients = [torch.randn(10_000_000) * 1e-3 + 1e-3, torch.randn(7, 5), torch.zeros(3)]
    expected, before = exact_norm(gradients), [gradient.clone() for gradient in gradients]
    max_norm = 0.5 * expected if large else 2 * expected
    assert clip_gradients(gradients, max_norm) == pytest.approx(expected, rel=1e-6)
    for gradient, old in zip(gradients, before, strict=True):
        torch.testing.assert_close(gradient, old * (0.5 if large else 1.0), rtol=1e-6, atol=0)


def test_zero_disables_clipping() -> None:
    gradients = [torch.full((4,), 50.0)]
    assert clip_gradients(gradients, 0.0) == pytest.approx(100.0)
    assert gradients[0].tolist() == [50.0] * 4
    assert clip_gradients([], 1.0) == 0.0


@pytest.mark.parametrize(("clip_norm", "clipped_norm"), [(0.25, 0.25), (0.0, None)])
def test_step_returns_the_norm_before_clipping_and_updates_with_clipped_gradients(
    clip_norm: float, clipped_norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = engine(replace(RUN.optim, clip_norm=clip_norm))
    torch.manual_seed(1)
    for parameter in plain.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    expected = exact_norm(list(plain.gradients().values()))
    norms_at_update: list[float] = []
    optimizer_step = plain._optimizer.step

    def record_norm_and_step() -> None:
        norms_at_update.append(exact_norm(list(plain.gradients().values())))
        optimizer_step()

    monkeypatch.setattr(plain._optimizer, "step", record_norm_and_step)
    assert plain.step(1e-3) == pytest.approx(expected, rel=1e-9)
    assert norms_at_update == [pytest.approx(clipped_norm or expected, rel=1e-5)]
