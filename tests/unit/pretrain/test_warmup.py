"""Warm-up in steps and as a fraction of the run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data_pipeline.common.config import dump_yaml, to_mapping
from data_pipeline.common.errors import ConfigError
from data_pipeline.common.yaml_file import to_yaml
from pretrain.cli.main import main
from pretrain.config.presets import load_run
from pretrain.config.schema import ScheduleConfig
from pretrain.optim.schedule import learning_rate
from tests.unit.pretrain.validate_support import find_problems


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(("ratio", "steps"), [(0.1, 30), (0.0, 0), (0.0333, 10), (0.25, 75)])
def test_a_ratio_is_a_fraction_of_the_run(kind: str, ratio: float, steps: int) -> None:
    mapping = {"kind": kind, "total_steps": 300}
    by_ratio = ScheduleConfig(**mapping, warmup_ratio=ratio)  # type: ignore[arg-type]
    by_steps = ScheduleConfig(**mapping, warmup_steps=steps)  # type: ignore[arg-type]
    assert by_ratio.num_warmup_steps == by_steps.num_warmup_steps == steps
    for step in range(0, 301, 7):
        assert learning_rate(step, by_ratio, 1.0) == learning_rate(step, by_steps, 1.0)


def test_without_both_there_are_100_steps() -> None:
    assert ScheduleConfig().num_warmup_steps == 100


def test_both_are_an_error_that_says_where_they_are_set() -> None:
    with pytest.raises(ConfigError) as error:
        load_run("tiny", ["schedule.warmup_ratio=0.1"])
    for part in (
        "schedule.warmup_steps is 100 and schedule.warmup_ratio is 0.1",
        "set schedule.warmup_steps=null or schedule.warmup_ratio=null",
        "schedule.warmup_steps in preset tiny, schedule.warmup_ratio on the command line",
    ):
        assert part in str(error.value)
    run = load_run("tiny", ["schedule.warmup_ratio=0.05", "schedule.warmup_steps=null"])
    assert run.schedule.num_warmup_steps == 50


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_ratios_out_of_range(ratio: float) -> None:
    (problem,) = find_problems([f"schedule={{warmup_steps: null, warmup_ratio: {ratio}}}"], 1)
    assert f"schedule.warmup_ratio is {ratio}, but must be in 0..1" in problem


def test_a_run_shorter_than_warmup_and_decay() -> None:
    settings = [
        "schedule={kind: wsd, total_steps: 200, warmup_steps: null, warmup_ratio: 0.9}",
        "schedule.decay_ratio=0.2",
    ]
    (problem,) = find_problems(settings, 1)
    assert "schedule.warmup_ratio is 0.9 (180 steps)" in problem
    assert "schedule.total_steps (200)" in problem
    fitting = re.search(r"set (schedule\.warmup_ratio=[\d.]+)", problem)
    assert fitting is not None and find_problems([*settings, fitting[1]], 1) == []


def test_settings_of_a_run_from_before_the_ratio_are_read(tmp_path: Path) -> None:
    run = load_run("tiny", ["schedule.warmup_steps=7"])
    mapping = to_mapping(run)
    del mapping["schedule"]["warmup_ratio"]
    (tmp_path / "config.yaml").write_text(to_yaml(mapping))
    assert load_run(tmp_path / "config.yaml") == run
    (tmp_path / "config.yaml").write_text(dump_yaml(load_run("first")))
    assert load_run(tmp_path / "config.yaml") == load_run("first")


def test_commands_show_it(capsys: pytest.CaptureFixture[str]) -> None:
    ratio = ["schedule.warmup_steps=null", "schedule.warmup_ratio=0.05"]
    assert main(["plan", "tiny", *ratio]) == 0
    assert "50 warmup steps" in capsys.readouterr().out
    assert main(["settings", "schedule.warmup_ratio"]) == 0
    assert "warmup_ratio: null" in capsys.readouterr().out
