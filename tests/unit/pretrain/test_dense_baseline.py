"""The dense baseline of a sparse run: equal FLOPs per pair, no experts, all else unchanged."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from data_pipeline.common.errors import ConfigError
from pretrain.cli.main import main
from pretrain.config.experts import BalanceConfig
from pretrain.config.presets import load_run
from pretrain.config.validate import problems
from pretrain.model import VisionLanguageModel
from pretrain.model.count import count_flops, count_parameters
from pretrain.model.dense_baseline import (
    TOLERANCE,
    config_overrides,
    dense_baseline,
    resolve_text_tokens,
)

RUNS = [
    ("tiny", []),
    ("quickstart", []),
    ("s16", []),
    ("b16", []),
    ("l16", []),
    ("h14", []),
    ("tiny", ["moe.router_input=caption"]),
    ("tiny", ["moe.every=2", "moe.top_k=5"]),
    ("tiny", ["moe.routing=noisy_top_k", "balance.load_weight=0.005", "moe.capacity_factor=1.25"]),
    ("tiny", ["balance.bias=sign"]),
    ("b16", ["parallel.expert_parallel_size=8"]),
    ("tiny", ["moe.expert_width=4", "moe.shared_experts=0"]),
]


@pytest.mark.parametrize(("name", "settings"), RUNS)
@pytest.mark.parametrize("text_tokens", [6, 16])
def test_equal_flops(name: str, settings: list[str], text_tokens: int) -> None:
    run = load_run(name, settings)
    baseline = dense_baseline(run, text_tokens=text_tokens)
    sparse_flops = count_flops(run.model, run.moe, text_tokens=text_tokens).training
    dense_flops = count_flops(baseline.model, baseline.moe, text_tokens=text_tokens).training
    assert dense_flops == pytest.approx(sparse_flops, rel=TOLERANCE)
    assert baseline.moe.blocks(baseline.model.num_layers) == ()

    for section in ("batch", "schedule", "optim", "data", "seed"):
        assert getattr(baseline, section) == getattr(run, section), section
    assert problems(baseline, 8 if name in ("s16", "b16", "l16", "h14") else 2) == []


def test_model_has_no_experts_and_as_many_parameters_as_are_active() -> None:
    run = load_run("tiny")
    baseline = dense_baseline(run, text_tokens=16)
    with torch.device("meta"):
        model = VisionLanguageModel(baseline.model, baseline.moe, baseline.balance)
    assert model.moe_layers() == []
    total = count_parameters(baseline.model, baseline.moe).total
    assert sum(p.numel() for p in model.parameters()) == total
    assert total == pytest.approx(count_parameters(run.model, run.moe).active, rel=0.01)


def test_ffn_width_grows_with_the_expert_width() -> None:
    widths = []
    for expert_width in (32, 64, 128):
        run = load_run("tiny", [f"moe.expert_width={expert_width}"])
        widths.append(dense_baseline(run, text_tokens=16).model.ffn_width)
    assert widths == sorted(set(widths))


def test_balancing_is_turned_off() -> None:
    settings = [
        "balance={balance_weight: 0.01, router_z_weight: 0.001, importance_weight: 0.1, "
        "bias: sign, local_entropy_weight: {text: 0.01}, expert_l1_weight: 1e-6}"
    ]
    baseline = dense_baseline(load_run("tiny", settings), text_tokens=16)
    assert baseline.balance == BalanceConfig(balance_weight=0.0, router_z_weight=0.0)


@pytest.mark.parametrize(
    ("expert_width", "ffn_width"),
    [
        (14, 96),  # 95 is closer, but the aligned 96 is off by less than half a percent
        (8, 84),  # the aligned 80 and 88 are off by about 1 %
    ],
)
def test_ffn_width_is_aligned_within_half_the_tolerance(expert_width: int, ffn_width: int) -> None:
    run = load_run("tiny", [f"moe.expert_width={expert_width}", "model.vocab_size=64"])
    assert dense_baseline(run, text_tokens=6).model.ffn_width == ffn_width


def test_error_if_no_integer_width_has_equal_flops() -> None:
    settings = [
        "model={width: 4, num_heads: 1, pool_heads: 1, vocab_size: 8, ffn_width: 1, "
        "image_size: 16, embed_dim: 4}",
        "moe={num_experts: 2, top_k: 1, shared_experts: 0, expert_width: 1}",
    ]
    with pytest.raises(ConfigError) as error:
        dense_baseline(load_run("tiny", settings), text_tokens=16)
    for part in ("model.ffn_width=2", "+3.0%", "1%", "moe.expert_width"):
        assert part in str(error.value)


def test_error_for_a_dense_run() -> None:
    with pytest.raises(ConfigError, match=r"tiny is dense already.*moe\.stop"):
        dense_baseline(load_run("tiny", ["moe.stop=0"]), text_tokens=16)


def test_text_tokens_are_at_most_the_context_length(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        resolved = [resolve_text_tokens(requested, 64) for requested in (None, 0.0, 7.5, 64.0)]
        assert resolved == [16, 0.0, 7.5, 64.0]
        assert resolve_text_tokens(None, 8) == 8
        assert caplog.messages == []
        assert resolve_text_tokens(100.0, 64) == 64
    (warning,) = caplog.messages
    for part in ("--text-tokens", "100", "model.context_length", "64"):
        assert part in warning


@pytest.mark.parametrize("requested", [-5.0, -0.01, float("nan"), float("inf"), float("-inf")])
def test_invalid_text_tokens(requested: float) -> None:
    with pytest.raises(ConfigError, match=rf"--text-tokens is {requested:g},.* finite"):
        resolve_text_tokens(requested, 64)


@pytest.mark.parametrize(("name", "settings"), RUNS)
def test_overrides_reproduce_the_baseline(name: str, settings: list[str]) -> None:
    run = load_run(name, settings)
    baseline = dense_baseline(run, text_tokens=16)
    assert load_run(name, [*settings, *config_overrides(run, baseline)]) == baseline
    assert config_overrides(run, run) == []


def test_plan_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny", "--dense-baseline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    ratios = {line[:20].strip(): line.split()[-1] for line in lines}
    assert float(ratios["FLOPs per pair"]) == pytest.approx(1, abs=TOLERANCE)
    assert "moe.stop=0" in lines[-1]

    assert main(["plan", "tiny", "--dense-baseline", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    dense_total = plans["dense"]["params"]["total"]
    sparse_total = plans["sparse"]["params"]["total"]
    assert dense_total < sparse_total
    assert float(ratios["parameters"]) == pytest.approx(dense_total / sparse_total, abs=1e-4)
    assert plans["dense"]["layout"]["moe_blocks"] == []
    assert plans["sparse"]["layout"]["moe_blocks"] == [1, 2, 3]


def test_plan_command_with_a_dense_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny", "moe.stop=0", "--dense-baseline"]) == 2
    assert "dense already" in capsys.readouterr().err
