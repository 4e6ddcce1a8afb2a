"""Studies: resuming after an interruption, reuse of complete trials, and settings of trials."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import ConfigError
from pretrain.config.experts import MoEConfig
from pretrain.config.presets import load_run
from pretrain.config.schema import ModelConfig, RunConfig
from tools import balancing_study, compare_dense_baseline
from tools.study.trials import Trial, load_trial, run_trials

RUN = RunConfig(model=ModelConfig(num_layers=3), moe=MoEConfig(num_experts=4))


class FakeTraining:
    """Replaces training and evaluation; is interrupted in run number `interrupt_at`."""

    def __init__(self, interrupt_at: int = 0) -> None:
        self.trained: list[str] = []
        self.interrupt_at = interrupt_at

    def train(self, run: RunConfig, folder: Path) -> None:
        self.trained.append(folder.name)
        if len(self.trained) == self.interrupt_at:
            raise KeyboardInterrupt

    def evaluate(self, folder: Path) -> dict[str, Any]:
        return {"folder": folder.name}


def run_study(
    out: Path, trials: list[Trial], training: FakeTraining
) -> dict[str, list[dict[str, Any]]]:
    return run_trials(trials, out, train=training.train, evaluate=training.evaluate)


def test_interrupted_study_resumes(tmp_path: Path) -> None:
    trials = [Trial(name, replace(RUN, seed=seed)) for seed in (0, 1) for name in ("a", "b")]
    interrupted, resumed, complete = FakeTraining(interrupt_at=3), FakeTraining(), FakeTraining()
    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path, trials, interrupted)
    results = run_study(tmp_path, trials, resumed)
    assert interrupted.trained == ["a-seed0", "b-seed0", "a-seed1"]
    assert resumed.trained == ["a-seed1", "b-seed1"]  # first the interrupted one again
    assert results == run_study(tmp_path, trials, complete)
    assert complete.trained == []
    assert results == {
        "a": [{"folder": "a-seed0"}, {"folder": "a-seed1"}],
        "b": [{"folder": "b-seed0"}, {"folder": "b-seed1"}],
    }


def test_added_seeds_train_only_the_new_runs(tmp_path: Path) -> None:
    run_study(tmp_path, [Trial("a", RUN)], FakeTraining())
    training = FakeTraining()
    run_study(tmp_path, [Trial("a", RUN), Trial("a", replace(RUN, seed=5))], training)
    assert training.trained == ["a-seed5"]


def test_folder_of_a_different_run_is_rejected(tmp_path: Path) -> None:
    run_study(tmp_path, [Trial("a", RUN)], FakeTraining())
    different = replace(RUN, moe=replace(RUN.moe, num_experts=8))
    with pytest.raises(ConfigError, match=r"a-seed0.*run\.yaml"):
        run_study(tmp_path, [Trial("a", different)], FakeTraining())


def test_repeated_trials_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = FakeTraining()
    repeated = [Trial(name, replace(RUN, seed=seed)) for seed in (3, 4, 3) for name in ("a", "b")]
    with pytest.raises(ConfigError, match=r"a-seed3.* 2 times"):
        run_study(tmp_path, repeated, training)
    assert training.trained == []

    settings = ["data.train=[x]", "data.tokenizer=x"]
    out = ["--out", str(tmp_path)]
    assert compare_dense_baseline.main(["--seeds", "0", "0", *out, *settings]) == 2
    error = capsys.readouterr().err
    assert "sparse-seed0" in error and "2 times" in error
    assert balancing_study.main(["--methods", "sign", "sign", *out, *settings]) == 2
    error = capsys.readouterr().err
    assert "sign-seed0" in error and "2 times" in error


def test_overrides_take_precedence() -> None:
    overrides = ["batch.micro_batch_size=32", "parallel.engine=deepspeed"]
    run = load_trial("quickstart", overrides, steps=0)
    assert (run.batch.micro_batch_size, run.parallel.engine) == (32, "deepspeed")
    assert run.schedule.total_steps == load_run("quickstart").schedule.total_steps


@pytest.mark.parametrize(("steps", "warmup"), [(50, 5), (600, 60), (2400, 100)])
def test_schedule_and_logs_of_a_trial(steps: int, warmup: int) -> None:
    run = load_trial("quickstart", [], steps=steps)
    assert (run.schedule.total_steps, run.schedule.warmup_steps) == (steps, warmup)
    assert (run.log.routing_every_steps, run.log.captions_every_steps) == (0, 0)
