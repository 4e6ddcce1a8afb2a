"""The number of steps of the quickstart: computed from a trial, and why is logged."""

from __future__ import annotations

import logging

import pytest

from pretrain.config.presets import load_run
from tools.quickstart import MAX_STEPS, choose_steps, schedule_settings


@pytest.mark.parametrize(
    ("minutes", "seconds_per_step", "steps", "logged"),
    [
        (9.3, 0.5, 1116, ["0.50 s per step", "1,116 steps fit", "9.3", "about 9.3 minutes"]),
        (9.3, 0.1, MAX_STEPS, ["0.10 s", "5,580 steps fit", "at most 2,400", "about 4.0 minutes"]),
        (0.01, 2.0, 1, ["2.00 s", "0 steps fit", "for 1 step"]),
    ],
)
def test_steps_and_their_reason(
    minutes: float,
    seconds_per_step: float,
    steps: int,
    logged: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_steps(minutes, seconds_per_step) == steps
    for part in [*logged, "--minutes", "--steps"]:
        assert part in caplog.text
    assert ("at most" in caplog.text) == (steps == MAX_STEPS)


@pytest.mark.parametrize("steps", [1, 16, 99, 100, MAX_STEPS])
def test_every_number_of_steps_is_a_valid_schedule(steps: int) -> None:
    schedule = load_run("quickstart", schedule_settings(steps)).schedule
    assert schedule.total_steps == steps
    if steps >= 100:  # an existing run keeps its schedule when it is resumed
        assert schedule.warmup_steps == load_run("quickstart").schedule.warmup_steps
