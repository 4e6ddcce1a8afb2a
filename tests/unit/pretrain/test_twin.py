"""The dense twin: as many FLOPs for every pair, no experts, everything else the same."""

from __future__ import annotations

import json

import pytest
import torch

from data_pipeline.common.errors import ConfigError
from pretrain.cli.main import main
from pretrain.config.presets import load_run
from pretrain.config.validate import problems
from pretrain.model import VisionLanguageModel
from pretrain.model.count import count_flops, count_parameters
from pretrain.model.twin import TOLERANCE, dense_twin, differing_settings

SETTINGS = [
    ("tiny", []), ("quickstart", []), ("s16", []), ("b16", []), ("l16", []), ("h14", []),
    ("tiny", ["moe.gate=caption"]), ("tiny", ["moe.every=2", "moe.experts_per_token=5"]),
    ("tiny", ["moe.choice=noisy", "balance.load_weight=0.005", "moe.capacity_factor=1.25", "balance.bias=sign"]),
    ("b16", ["parallel.expert_parallel=8"]), ("tiny", ["moe.expert_width=4", "moe.shared_experts=0"]),
]


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
@pytest.mark.parametrize("text_tokens", [6, 16])
def test_a_pair_costs_as_much_within_one_percent(name: str, settings: list[str], text_tokens: int) -> None:
    run = load_run(name, settings)
    twin = dense_twin(run, text_tokens=text_tokens)
    sparse = count_flops(run.model, run.moe, text_tokens=text_tokens).training
    dense = count_flops(twin.model, twin.moe, text_tokens=text_tokens).training
    assert dense == pytest.approx(sparse, rel=TOLERANCE)
    assert twin.moe.blocks(twin.model.num_blocks) == ()
    assert (twin.batch, twin.schedule, twin.optim, twin.data, twin.seed) == (
        run.batch, run.schedule, run.optim, run.data, run.seed)
    assert problems(twin, 8 if name in ("s16", "b16", "l16", "h14") else 2) == []


def test_the_twin_is_built_without_experts_and_about_as_large_as_the_active_part() -> None:
    run = load_run("tiny")
    twin = dense_twin(run, text_tokens=16)
    with torch.device("meta"):
        model = VisionLanguageModel(twin.model, twin.moe, twin.balance)
    assert model.moe_layers() == []
    assert sum(p.numel() for p in model.parameters()) == count_parameters(twin.model, twin.moe).total
    assert count_parameters(twin.model, twin.moe).total == pytest.approx(
        count_parameters(run.model, run.moe).active, rel=0.01)


def test_wider_experts_make_a_wider_twin() -> None:
    widths = [dense_twin(load_run("tiny", [f"moe.expert_width={width}"]), text_tokens=16).model.ffn_width
              for width in (32, 64, 128)]
    assert widths == sorted(set(widths))


def test_a_run_without_experts_has_no_twin() -> None:
    with pytest.raises(ConfigError, match="dense already and has no twin"):
        dense_twin(load_run("tiny", ["moe.stop=0"]), text_tokens=16)


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_the_settings_that_are_printed_make_the_twin(name: str, settings: list[str]) -> None:
    run = load_run(name, settings)
    twin = dense_twin(run, text_tokens=16)
    assert load_run(name, [*settings, *differing_settings(run, twin)]) == twin
    assert differing_settings(run, run) == []


def test_plan_shows_both_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny", "--twin"]) == 0
    text = capsys.readouterr().out
    flops = next(line for line in text.splitlines() if line.startswith("FLOPs per pair")).split()
    assert float(flops[-1]) == pytest.approx(1, abs=TOLERANCE)
    assert "moe.stop=0" in text.splitlines()[-1]
    assert main(["plan", "tiny", "--twin", "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["twin"]["layout"]["moe_blocks"] == [] and both["sparse"]["layout"]["moe_blocks"] == [1, 2, 3]
    assert both["twin"]["params"]["total"] < both["sparse"]["params"]["total"]
    assert main(["plan", "tiny", "moe.stop=0", "--twin"]) == 2
    assert "dense already" in capsys.readouterr().err
