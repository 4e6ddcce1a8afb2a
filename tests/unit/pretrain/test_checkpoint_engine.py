"""Saving and resuming a `PlainEngine`: weights, routing biases and optimizer state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import CheckpointError, load_latest, load_model_weights, read_meta, save
from pretrain.checkpoint.saved_state import SavedState
from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.config.schema import ModelConfig, OptimConfig, RunConfig
from pretrain.model import build_model
from pretrain.model.vision_language import valid_positions
from pretrain.parallel.layout import Layout
from pretrain.parallel.plain_engine import PlainEngine

RUN = RunConfig(
    model=ModelConfig(
        width=32,
        num_layers=3,
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
    optim=OptimConfig(lr=1e-2),
)


LAYOUT = Layout(
    world_size=1, expert_parallel_size=1, zero_stage=-1, precision="fp32", num_experts=4
)


def new_engine(seed: int) -> PlainEngine:
    model = build_model(RunConfig(seed=seed, model=RUN.model, moe=RUN.moe))
    return PlainEngine(model, RUN.optim, LAYOUT, torch.device("cpu"))


def engine_with_biases(**balance: Any) -> PlainEngine:
    run = replace(RUN, balance=BalanceConfig(**balance))
    return PlainEngine(build_model(run), run.optim, LAYOUT, torch.device("cpu"))


def train(engine: PlainEngine, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=generator)
        ids = torch.randint(4, 50, (4, 8), generator=generator)
        lengths = torch.tensor([8, 3, 5, 2])
        output = engine.model(
            images, ids, lengths, engine.model.token_batch(ids, valid_positions(lengths, 8))
        )
        loss = output.caption_loss_sum / output.caption_tokens
        engine.backward(loss, last=True)
        engine.step(1e-2)
        losses.append(float(loss.detach()))
    return losses


def test_resumed_run_has_the_losses_of_an_uninterrupted_run(tmp_path: Path) -> None:
    uninterrupted = train(new_engine(0), 0, 6)
    first = new_engine(0)
    losses = train(first, 0, 3)
    path = save(first, root=tmp_path, step=3, state_json={"step": 3})
    second = new_engine(1)
    resumed = load_latest(second, tmp_path)
    assert resumed is not None
    assert (resumed.path, resumed.state_json) == (path, {"step": 3})
    assert losses + train(second, 3, 6) == uninterrupted


def test_load_model_weights_returns_the_weights_of_the_engine(tmp_path: Path) -> None:
    engine = new_engine(0)
    weights = load_model_weights(save(engine, root=tmp_path, step=0, state_json={}))
    expected = dict(engine.model.named_parameters())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_biases_are_saved_with_the_weights(tmp_path: Path) -> None:
    first, second = (engine_with_biases(bias="sign", bias_per_modality=True) for _ in range(2))
    for layer in first.model.moe_layers():
        layer.update_bias(torch.rand(2, 4), 0.01)
    save(first, root=tmp_path, step=0, state_json={})
    resumed = load_latest(second, tmp_path)
    assert resumed is not None
    weights = load_model_weights(resumed.path)
    for name, bias in first.model.named_buffers():
        assert bias.any() and torch.equal(weights[name], bias)
        assert torch.equal(dict(second.model.named_buffers())[name], bias)
    assert weights.keys() == second.model.state_dict().keys()


@pytest.mark.parametrize(
    ("written", "read", "parts"),
    [
        (
            {"bias": "none"},
            {"bias": "sign"},
            ["'blocks.1.ffn.bias.value' has shape none in the checkpoint", "1 more differ"],
        ),
        (
            {"bias": "sign"},
            {"bias": "none"},
            ["'blocks.1.ffn.bias.value'", "none in this run's model"],
        ),
        (
            {"bias": "sign"},
            {"bias": "sign", "bias_per_modality": True},
            ["'blocks.1.ffn.bias.value'", "[1, 4]", "[2, 4]"],
        ),
        (
            {"bias": "zscore", "bias_per_modality": True},
            {"bias": "zscore"},
            ["'blocks.1.ffn.bias.value'", "[2, 4]", "[1, 4]"],
        ),
    ],
)
def test_other_bias_settings_are_an_error(
    written: dict[str, Any], read: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    save(engine_with_biases(**written), root=tmp_path, step=0, state_json={})
    load_latest(engine_with_biases(**written), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_latest(engine_with_biases(**read), tmp_path)
    text = str(caught.value)
    for part in [*parts, "balance.bias", "balance.bias_per_modality", "config.yaml"]:
        assert part in text


def test_optimizer_state_is_loaded_to_the_device_of_its_parameter(tmp_path: Path) -> None:
    """Including step counts, which the fused optimizer reads on the GPU."""
    engine = new_engine(0)
    train(engine, 0, 1)
    path = save(engine, root=tmp_path, step=1, state_json={})
    engine.model.to("meta")  # in place of a GPU
    engine.load_state(SavedState(path, read_meta(path)))
    states = [engine._optimizer.state.get(parameter) for parameter in engine.model.parameters()]
    loaded = list(filter(None, states))  # some parameters have no gradient yet
    assert len(loaded) > 20
    assert {tensor.device.type for state in loaded for tensor in state.values()} == {"meta"}
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in loaded)
