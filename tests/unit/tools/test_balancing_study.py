"""The balancing study: its trials, its options, and the topology of all methods."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.config.experts import BalanceConfig
from pretrain.config.presets import load_run
from pretrain.config.validate import problems
from tools import balancing_study, compare_dense_baseline
from tools.balancing_study import main, make_trials
from tools.study.methods import METHODS, TOPOLOGY
from tools.study.trials import Trial

NAMES = [method.name for method in METHODS]


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    return make_trials("quickstart", [], methods=NAMES, seeds=[0, 1], steps=50)


def test_methods_are_distinct_and_keep_the_topology(trials: list[Trial]) -> None:
    base = load_run("quickstart").moe
    assert len(trials) == 2 * len(METHODS)
    for trial in trials:
        assert problems(trial.run, 1) == []
        assert all(getattr(trial.run.moe, name) == getattr(base, name) for name in TOPOLOGY)
    settings = {(trial.run.moe, trial.run.balance) for trial in trials}
    assert len(settings) == len(METHODS)


def test_order_and_schedule_of_trials(trials: list[Trial]) -> None:
    assert [trial.name for trial in trials] == NAMES * 2
    assert [trial.run.seed for trial in trials] == [0] * len(METHODS) + [1] * len(METHODS)
    for trial in trials:
        assert trial.run.schedule.total_steps == 50
        assert trial.run.batch.micro_batch_size == trial.run.batch.global_batch_size == 128


def test_settings_of_methods_and_presets(trials: list[Trial]) -> None:
    runs = {trial.name: trial.run for trial in trials}
    assert runs["none"].balance == BalanceConfig(balance_weight=0.0, router_z_weight=0.0)

    limoe = runs["preset-limoe"]
    assert limoe.balance == load_run("limoe").balance
    assert limoe.moe.routing == "noisy_top_k"
    assert (limoe.moe.capacity_factor, limoe.moe.top_k) == (1.25, 2)

    vl_moe = runs["preset-vl_moe"].moe
    assert (vl_moe.pools, vl_moe.norm_topk_prob, vl_moe.top_k) == ("modality", False, 2)


def test_unknown_method_is_rejected(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--methods", "swich", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "swich" in error and "none, balance," in error


@pytest.mark.parametrize("command", [balancing_study, compare_dense_baseline])
def test_help_has_examples(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        command.main(["--help"])
    assert exit_info.value.code == 0
    assert f"examples:\n  python -m {command.__name__} " in capsys.readouterr().out
