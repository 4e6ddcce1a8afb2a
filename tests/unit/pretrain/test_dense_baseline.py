"""The dense twin: as many FLOPs for every pair, no experts, everything else the same."""

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
    caption_tokens,
    dense_baseline,
    settings_that_differ,
)

SETTINGS = [
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


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
@pytest.mark.parametrize("text_tokens", [6, 16])
def test_a_pair_costs_as_much_within_one_percent(
    name: str, settings: list[str], text_tokens: int
) -> None:
    run = load_run(name, settings)
    twin = dense_baseline(run, text_tokens=text_tokens)
    sparse = count_flops(run.model, run.moe, text_tokens=text_tokens).training
    dense = count_flops(twin.model, twin.moe, text_tokens=text_tokens).training
    assert dense == pytest.approx(sparse, rel=TOLERANCE)
    assert twin.moe.blocks(twin.model.num_layers) == ()
    assert (twin.batch, twin.schedule, twin.optim, twin.data, twin.seed) == (
        run.batch,
        run.schedule,
        run.optim,
        run.data,
        run.seed,
    )
    assert problems(twin, 8 if name in ("s16", "b16", "l16", "h14") else 2) == []


def test_the_twin_is_built_without_experts_and_about_as_large_as_the_active_part() -> None:
    run = load_run("tiny")
    twin = dense_baseline(run, text_tokens=16)
    with torch.device("meta"):
        model = VisionLanguageModel(twin.model, twin.moe, twin.balance)
    assert model.moe_layers() == []
    assert (
        sum(p.numel() for p in model.parameters()) == count_parameters(twin.model, twin.moe).total
    )
    assert count_parameters(twin.model, twin.moe).total == pytest.approx(
        count_parameters(run.model, run.moe).active, rel=0.01
    )


def test_wider_experts_make_a_wider_twin() -> None:
    widths = [
        dense_baseline(
            load_run("tiny", [f"moe.expert_width={width}"]), text_tokens=16
        ).model.ffn_width
        for width in (32, 64, 128)
    ]
    assert widths == sorted(set(widths))


def test_nothing_is_balanced_that_is_not_there() -> None:
    settings = [
        "balance={balance_weight: 0.01, router_z_weight: 0.001, importance_weight: 0.1, bias: sign, "
        "local_entropy_weight: {text: 0.01}, expert_l1_weight: 1e-6}"
    ]
    twin = dense_baseline(load_run("tiny", settings), text_tokens=16)
    assert twin.balance == BalanceConfig(balance_weight=0.0, router_z_weight=0.0)


def test_a_width_is_aligned_only_where_that_is_near_enough() -> None:
    def width(expert_width: int) -> int:
        run = load_run("tiny", [f"moe.expert_width={expert_width}", "model.vocab_size=64"])
        return dense_baseline(run, text_tokens=6).model.ffn_width

    assert width(14) == 96  # 95 would be nearer, but 96 is off by less than half a percent
    assert width(8) == 84  # 80 and 88 are off by about 1 %


def test_experts_that_no_whole_width_equals_have_no_twin() -> None:
    tiniest = [
        "model={width: 4, num_heads: 1, pool_heads: 1, vocab_size: 8, ffn_width: 1, image_size: 16, "
        "embed_dim: 4}",
        "moe={num_experts: 2, top_k: 1, shared_experts: 0, expert_width: 1}",
    ]
    with pytest.raises(
        ConfigError, match=r"model.ffn_width=2 has \+3.0% .* no whole width comes nearer than 1%"
    ):
        dense_baseline(load_run("tiny", tiniest), text_tokens=16)


def test_captions_are_as_long_as_captions_can_be(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert [caption_tokens(asked, 64) for asked in (None, 0.0, 7.5, 64.0)] == [
            16,
            0.0,
            7.5,
            64.0,
        ]
        assert caption_tokens(None, 8) == 8
        assert caplog.messages == []
        assert caption_tokens(100.0, 64) == 64
    assert caplog.messages == [
        "--text-tokens is 100, but captions end at model.context_length (64): counting 64"
    ]


@pytest.mark.parametrize("asked", [-5.0, -0.01, float("nan"), float("inf"), float("-inf")])
def test_numbers_of_tokens_that_cannot_be_are_refused(asked: float) -> None:
    with pytest.raises(
        ConfigError, match=rf"--text-tokens is {asked:g}, but must be a finite number"
    ):
        caption_tokens(asked, 64)


def test_a_run_without_experts_has_no_twin() -> None:
    with pytest.raises(ConfigError, match="dense already and has no twin"):
        dense_baseline(load_run("tiny", ["moe.stop=0"]), text_tokens=16)


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_the_settings_that_are_printed_make_the_twin(name: str, settings: list[str]) -> None:
    run = load_run(name, settings)
    twin = dense_baseline(run, text_tokens=16)
    assert load_run(name, [*settings, *settings_that_differ(run, twin)]) == twin
    assert settings_that_differ(run, run) == []


def test_plan_shows_both_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny", "--twin"]) == 0
    text = capsys.readouterr().out
    ratios = {line[:20].strip(): line.split()[-1] for line in text.splitlines()}
    assert float(ratios["FLOPs per pair"]) == pytest.approx(1, abs=TOLERANCE)
    assert "moe.stop=0" in text.splitlines()[-1]
    assert main(["plan", "tiny", "--twin", "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    totals = [both[which]["params"]["total"] for which in ("twin", "sparse")]
    assert (
        float(ratios["parameters"]) == pytest.approx(totals[0] / totals[1], abs=1e-4)
        and totals[0] < totals[1]
    )
    assert both["twin"]["layout"]["moe_blocks"] == [] and both["sparse"]["layout"][
        "moe_blocks"
    ] == [1, 2, 3]
    assert both["twin"]["params"]["total"] < both["sparse"]["params"]["total"]
    assert main(["plan", "tiny", "moe.stop=0", "--twin"]) == 2
    assert "dense already" in capsys.readouterr().err
