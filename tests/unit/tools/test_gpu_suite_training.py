"""The GPU suite's training runs: which outcomes pass, and what is read from metrics.jsonl."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.train.jsonl import JsonlWriter
from tests.support.log_entries import log_entry
from tools.bench_loader import workloads
from tools.gpu_suite import training_runs
from tools.gpu_suite.options import Options
from tools.gpu_suite.results import Report

TWO_LOSSES = (3.5, 2.5)
NAN_LOSS = (3.5, math.nan)


def report_of_run(
    losses: Sequence[float],
    status: int | None,
    seconds: float,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Report:
    """The report of a run of `tiny` with these losses and exit status; None means a timeout."""

    def train(command: list[str], *, timeout: float, **kwargs: Any) -> Any:
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir(parents=True)
        metrics = JsonlWriter(folder / "metrics.jsonl", resumed_step=0)
        for step, loss in enumerate(losses, start=1):
            metrics.write(log_entry(step, total=loss).to_row())
        metrics.close()
        if status is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=status, stdout="", stderr="first\nthe reason")

    def prepare(workload: workloads.Workload, root: Path) -> Any:
        return SimpleNamespace(folder=root, tokenizer=root)

    monkeypatch.setattr(workloads, "prepare", prepare)
    monkeypatch.setattr(training_runs.subprocess, "run", train)
    report = Report()
    options = Options(
        device=torch.device("cpu"), deadline=time.monotonic() + seconds, scratch=scratch
    )
    training_runs.tiny_run(options, report)
    return report


@pytest.mark.parametrize(
    ("losses", "status", "seconds", "passed"),
    [
        (TWO_LOSSES, 0, 90, True),
        (TWO_LOSSES, None, 20, True),  # stopped when its time was up
        (TWO_LOSSES, 1, 90, False),
        (NAN_LOSS, 0, 90, False),
        ((), 0, 90, False),
        ((), None, 90, False),  # hangs
    ],
)
def test_run_must_succeed_with_finite_losses(
    losses: Sequence[float],
    status: int | None,
    seconds: float,
    passed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (check,) = report_of_run(losses, status, seconds, tmp_path, monkeypatch).checks
    assert (check.name, check.passed) == ("tiny trains", passed)
    measured = {0: "no step", 2: "loss 3.500 to " + ("nan" if losses is NAN_LOSS else "2.500")}
    assert check.measured == measured[len(losses)]
    if status:
        assert "the reason" in check.note


def test_too_little_time_for_a_step_is_not_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = report_of_run((), None, 20, tmp_path, monkeypatch)
    assert report.checks == []
    measurement = report.measurements[0]
    assert "no step" in measurement.note and "17 s" in measurement.note
    assert (measurement.name, measurement.verdict()) == ("tiny trains", "not measured")


def test_measurements_exclude_the_warm_up() -> None:
    first = log_entry().throughput
    rows = [
        log_entry(throughput=replace(first, samples_per_second=speed, mfu=0.3))
        for speed in (1.0, 2.0, 30.0, 40.0)
    ]
    measurements = training_runs.run_measurements("s16", rows)
    values = {measurement.name: measurement.value for measurement in measurements}

    speed = values["s16: samples per second"]
    assert speed is not None and speed.median == 35.0
    mfu = values["s16: model FLOPs utilization"]
    assert mfu is not None and mfu.median == pytest.approx(30)


def test_metrics_that_were_not_measured_have_a_reason() -> None:
    measurements = training_runs.run_measurements("s16", [log_entry(step) for step in range(4)])
    missing = [measurement for measurement in measurements if measurement.value is None]
    assert [measurement.name for measurement in missing] == ["s16: model FLOPs utilization"]
    assert "peak FLOP/s" in missing[0].note
    assert all(row.value is None for row in training_runs.run_measurements("s16", [log_entry()]))
