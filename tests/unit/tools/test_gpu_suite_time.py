"""Time limits of the GPU suite: crashes, timeouts, budgets and the order of measurements."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.launch import ROOT
from tests.unit.tools.gpu_suite_process import run_suite
from tools.bench_moe.limits import Limits
from tools.bench_moe.results import ShapeResult
from tools.bench_moe.shapes import Shape
from tools.gpu_suite import __main__ as command
from tools.gpu_suite import runner, speed
from tools.gpu_suite.parts import PARTS
from tools.gpu_suite.results import Report


def run_script_as_part(
    name: str,
    ending: str,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    budget: float,
    full_budget: float,
) -> Report:
    """Run a part that reports one check and then executes `ending`."""
    path = scratch / f"{name}.json"
    script = (
        f"import sys, time; from pathlib import Path; "
        f"from tools.gpu_suite.results import Check, Report; "
        f"Report(path=Path({str(path)!r})).add(Check(name='one', passed=True)); {ending}"
    )
    monkeypatch.setattr(runner, "part_command", lambda *args: [sys.executable, "-c", script])
    monkeypatch.setattr(runner, "GRACE_SECONDS", 2.0)
    monkeypatch.setitem(PARTS, name, PARTS[name]._replace(seconds=full_budget))
    monkeypatch.chdir(ROOT)
    start = time.monotonic()
    report = runner.run_part(name, budget, scratch, command._parse(["--cpu"]))
    assert time.monotonic() - start < 20
    return report


@pytest.mark.parametrize(
    ("ending", "note"), [("time.sleep(60)", "timed out"), ("sys.exit(3)", "status 3")]
)
def test_crash_or_timeout_fails_and_keeps_earlier_results(
    ending: str, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run_script_as_part("layer", ending, tmp_path, monkeypatch, budget=1.0, full_budget=1.0)
    assert [check.name for check in report.checks] == ["one", "completes"]
    assert not report.checks[1].passed and note in report.checks[1].note


@pytest.mark.parametrize(("name", "full_budget"), [("speed", 1.0), ("layer", 50.0)])
def test_timeout_of_measurements_or_with_less_than_the_budget_is_no_failure(
    name: str, full_budget: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run_script_as_part(
        name, "time.sleep(60)", tmp_path, monkeypatch, budget=1.0, full_budget=full_budget
    )
    assert [check.name for check in report.checks] == ["one"]
    (measurement,) = report.measurements
    assert measurement.verdict() == "not measured" and "1 s" in measurement.note


def test_crash_of_measurements_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run_script_as_part(
        "speed", "sys.exit(3)", tmp_path, monkeypatch, budget=1.0, full_budget=50.0
    )
    assert [check.passed for check in report.checks] == [True, False]


def test_parts_without_time_are_listed(tmp_path: Path) -> None:
    done = run_suite("--cpu", "--seconds", "5", "--out", str(tmp_path / "gpu.json"), timeout=60)
    assert done.returncode == 0
    assert done.stdout.count("no time left") == len(PARTS)


def test_part_starts_with_at_least_half_of_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets: dict[str, float] = {}

    def run_part(name: str, budget: float, *args: Any) -> Report:
        budgets[name] = budget
        return Report()

    monkeypatch.setattr(command, "run_part", run_part)
    out = tmp_path / "gpu.json"
    parts = [option for name in ("layer", "s16", "tiny") for option in ("--only", name)]
    assert command.main(["--cpu", "--seconds", "50", *parts, "--out", str(out)]) == 0
    assert budgets == pytest.approx({"layer": 50, "tiny": 50}, abs=5)
    assert "130 s" in json.loads(out.read_text())["parts"]["s16"]["skipped"]


def test_time_of_a_shape_is_predicted_from_its_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = Shape("small", 64, 32, 16, 8, 2), Shape("large", 256, 32, 16, 8, 2)
    measured: list[tuple[str, str]] = []

    class FakeOptions:
        """A limit of 35 seconds, with a clock that advances only during measurements."""

        now = 0.0
        device, on_gpu = torch.device("cuda"), True

        def seconds_left(self) -> float:
            return 35.0 - self.now

    options: Any = FakeOptions()

    def measure(shape: Shape, *args: Any, **kwargs: Any) -> list[ShapeResult]:
        measured.append((shape.name, shape.load))
        options.now += 10 * shape.flops / small.flops
        return [ShapeResult(shape, not_measured={"other": "out of memory"})]

    monkeypatch.setattr(speed, "GPU_SHAPES", (small, large))
    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed, "measure_limits", lambda *args, **kwargs: Limits(1.0, 1.0))
    monkeypatch.setattr(speed, "time", SimpleNamespace(monotonic=lambda: options.now))
    report = Report()
    speed.layer_speed(options, report)

    # 10 s each; the large shape would take 40 s.
    assert measured == [("small", "even"), ("small", "uneven")]
    postponed = [row for row in report.measurements if "no time left" in row.note]
    assert [row.name.partition(":")[0] for row in postponed] == ["large, even", "large, uneven"]
    assert report.checks == [] and "40 s" in postponed[0].note


def test_budgets_fit_into_nine_minutes() -> None:
    assert sum(part.seconds for part in PARTS.values()) <= command.TOTAL_SECONDS < 540
