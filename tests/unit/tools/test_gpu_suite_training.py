"""The GPU suite's training runs: which outcomes pass, and what is read from metrics.jsonl."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tools.bench_loader import workloads
from tools.gpu_suite import training_runs
from tools.gpu_suite.options import Options
from tools.gpu_suite.results import Report

TWO_LOSSES = ['{"loss/total": 3.5}', '{"loss/total": 2.5}']
NAN_LOSS = ['{"loss/total": 3.5}', '{"loss/total": NaN}']


def report_of_run(
    rows: list[str],
    status: int | None,
    seconds: float,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Report:
    """The report of a run of `tiny` with these rows and exit status; None means a timeout."""

    def train(command: list[str], *, timeout: float, **kwargs: Any) -> Any:
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
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
    ("rows", "status", "seconds", "passed"),
    [
        (TWO_LOSSES, 0, 90, True),
        (TWO_LOSSES, None, 20, True),  # stopped when its time was up
        (TWO_LOSSES, 1, 90, False),
        (NAN_LOSS, 0, 90, False),
        ([], 0, 90, False),
        ([], None, 90, False),  # hangs
    ],
)
def test_run_must_succeed_with_finite_losses(
    rows: list[str],
    status: int | None,
    seconds: float,
    passed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (check,) = report_of_run(rows, status, seconds, tmp_path, monkeypatch).checks
    assert (check.name, check.passed) == ("tiny trains", passed)
    measured = {0: "no step", 2: "loss 3.500 to " + ("nan" if rows is NAN_LOSS else "2.500")}
    assert check.measured == measured[len(rows)]
    if status:
        assert "the reason" in check.note


def test_too_little_time_for_a_step_is_not_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = report_of_run([], None, 20, tmp_path, monkeypatch)
    assert report.checks == []
    measurement = report.measurements[0]
    assert "no step" in measurement.note and "17 s" in measurement.note
    assert (measurement.name, measurement.verdict()) == ("tiny trains", "not measured")


def test_incomplete_last_row_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"perf/samples_per_second": speed, "perf/mfu": 0.3} for speed in (1.0, 2.0, 30.0, 40.0)]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"perf/samples_per')
    measurements = training_runs.run_measurements("s16", training_runs.read_rows(path))
    values = {measurement.name: measurement.value for measurement in measurements}

    speed = values["s16: samples per second"]
    assert speed is not None and speed.median == 35.0  # without the warm-up
    mfu = values["s16: model FLOPs utilization"]
    assert mfu is not None and mfu.median == pytest.approx(30)
    assert values["s16: memory"] is None
    assert training_runs.read_rows(tmp_path / "none.jsonl") == []
