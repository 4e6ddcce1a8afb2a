"""The GPU suite on the CPU: all parts run, and their results are reported."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.unit.tools.gpu_suite_process import run_suite
from tools.gpu_suite import __main__ as command
from tools.gpu_suite.layer_cases import ROUTING_CASES, SYNC_ONLY_CASES
from tools.gpu_suite.parts import PARTS
from tools.gpu_suite.results import HEADER, Check, Report, check_at_most, measurement_row
from tools.measurements import Measurement, not_measured
from tools.timing import Quartiles

SuiteRun = tuple[CompletedProcess[str], dict[str, Any]]
"""The finished process and its JSON report."""


@pytest.fixture(scope="module")
def suite_run(tmp_path_factory: pytest.TempPathFactory) -> SuiteRun:
    out = tmp_path_factory.mktemp("suite") / "gpu.json"
    done = run_suite("--cpu", "--out", str(out))
    return done, json.loads(out.read_text())


def test_all_parts_run_and_pass(suite_run: SuiteRun) -> None:
    done, report = suite_run
    assert done.returncode == 0 and report["failed"] == [], done.stdout + done.stderr
    assert list(report["parts"]) == list(PARTS) == list(report["seconds"])
    parts = report["parts"]
    assert all(part["checks"] and not part["skipped"] for part in parts.values())
    assert len(parts["layer"]["checks"]) == len(ROUTING_CASES)
    assert len(parts["sync"]["checks"]) == len(ROUTING_CASES) + len(SYNC_ONLY_CASES)
    step_checks = {check["name"].rpartition(": ")[2] for check in parts["step"]["checks"]}
    assert {"loss contrastive", "gradient norm"} <= step_checks
    assert any("DeepSpeed" in row["name"] for row in parts["speed"]["measurements"])
    for preset in ("tiny", "s16"):
        rows = {row["name"]: row for row in parts[preset]["measurements"]}
        assert rows[f"{preset}: samples per second"]["value"]["median"] > 0
        assert rows[f"{preset}: model FLOPs utilization"]["note"]


def test_output_ends_with_the_table(suite_run: SuiteRun) -> None:
    done, report = suite_run
    lines = done.stdout.rstrip().splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("| part"))
    assert all(line.startswith("| ") for line in lines[first:])
    results = sum(
        len(part["checks"]) + len(part["measurements"]) for part in report["parts"].values()
    )
    assert len(lines) - first == results + 2
    assert "no GPU" in done.stdout


def test_unknown_part_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "layr"]) == 2
    assert "layr" in capsys.readouterr().err


def test_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = command._parse(["--cpu", "--out", str(tmp_path / "gpu.json")])
    passed = Report(checks=[check_at_most("small", 0.1, 1)])
    skipped = Report(skipped="obstore is not installed")
    assert command.write_report({"layer": passed, "s16": skipped}, {}, options) == 0
    assert "obstore is not installed" in capsys.readouterr().out

    failed = Report(checks=[check_at_most("nan", float("nan"), 1)])
    assert command.write_report({"layer": failed}, {}, options) == 1
    assert json.loads((tmp_path / "gpu.json").read_text())["failed"] == ["layer: nan"]


def test_report_survives_its_file(tmp_path: Path) -> None:
    report = Report(path=tmp_path / "part.json")
    report.add(
        Check(name="a", passed=True, note="b"),
        Measurement(name="c", value=Quartiles(1, 2, 3), floor=1.5),
    )
    report.add(not_measured("d", "some reason"))
    restored = Report.from_json(json.loads((tmp_path / "part.json").read_text()))
    assert (restored.checks, restored.measurements) == (report.checks, report.measurements)
    assert restored.skipped == ""

    rows = [check.row("x") for check in restored.checks]
    rows += [measurement_row("x", measurement) for measurement in restored.measurements]
    assert all(len(row) == len(HEADER) for row in rows)
    assert rows[1][3:5] == ["at least 1.50", "floor"]
    assert rows[2][4:] == ["not measured", "some reason"]
