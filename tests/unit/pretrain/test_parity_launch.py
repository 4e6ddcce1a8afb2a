"""`pretrain.parity.launch`: which case and which status a failure of ranks is reported with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.parity import launch as launch_module
from pretrain.parity.cases import Case
from pretrain.parity.job import Job, read_messages
from pretrain.parity.launch import launch_local_ranks
from pretrain.parity.report import Report
from tests.support.launch import ROOT

RANK = """
import os, sys, time
from pathlib import Path
from pretrain.parity.job import *

job = Job.from_json(Path(sys.argv[1]).read_text())
rank = int(os.environ["RANK"])

def done(index):
    result = Result(case=job.cases[index], world_size=2, status="ok")
    append_message(job.messages_path(0), case_message(index, result))

def fail(failure, reason):
    message = {"failure": failure, "reason": reason, "time": time.time()}
    append_message(job.messages_path(rank), message)
    os._exit(3)  # at once, as `time_limit` does
"""


def launch(program: str, folder: Path, cases: int) -> Report:
    """Run two ranks with this program."""
    worker = folder / "rank.py"
    worker.write_text(RANK + program, encoding="utf-8")
    job = Job(
        runs={},
        cases=tuple(Case(zero=str(index)) for index in range(cases)),
        pairs=8,
        folder=str(folder),
        seconds=5,
    )
    report = Report(metadata={}, out=None, is_rank_zero=False)
    variables = {"PYTHONPATH": str(ROOT)}
    launch_local_ranks(job, 2, report.handle_message, worker=[str(worker)], variables=variables)
    return report


def statuses(report: Report) -> list[tuple[str, str]]:
    return [(result.case.zero, result.status) for result in report.results]


def test_ranks_that_exit_early_without_an_error(tmp_path: Path) -> None:
    program = "if rank == 0 and job.first == 0: done(0)"
    report = launch(program, tmp_path, 2)
    assert statuses(report) == [("0", "ok"), ("1", "error")] and not report.is_ok
    assert "after 1 case" in report.results[1].reason


def test_a_result_that_is_written_after_a_failure_of_the_next_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_module, "REPORT_SECONDS", 4.0)  # enough on a busy machine
    program = """
if job.first == 0:
    if rank == 1:
        fail("error", "rank 1, case 1: boom")
    while not read_messages(job.messages_path(1)):
        time.sleep(0.01)
    time.sleep(0.4)  # the launcher has noticed the exit, and waits for messages of other ranks
    done(0)
    time.sleep(30)
"""
    report = launch(program, tmp_path, 2)
    assert statuses(report) == [("0", "ok"), ("1", "error")]
    assert "boom" in report.results[1].reason


def test_a_hang_is_the_cause_of_lost_connections(tmp_path: Path) -> None:
    program = """
if rank == 1:
    fail("hang", "rank 1: timed out in forward")
while not read_messages(job.messages_path(1)):
    time.sleep(0.05)
fail("error", "rank 0: connection closed by peer")
"""
    (result,) = launch(program, tmp_path, 1).results
    assert result.status == "hang" and result.reason.startswith("rank 1: timed out in forward; ")


def test_failures_after_the_last_case(tmp_path: Path) -> None:
    for failure, is_ok in (("no-float64", True), ("error", False)):
        program = f"""
if rank == 0:
    done(0)
    fail({failure!r}, "late")
time.sleep(30)
"""
        report = launch(program, tmp_path, 1)
        assert statuses(report) == [("0", "ok")] and report.is_ok == is_ok


def test_the_time_limit_names_the_location_and_ends_the_process(tmp_path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from pretrain.parity.deadline import time_limit

with time_limit(0.3, "rank 0, a case", Path(sys.argv[1])):
    if sys.argv[2] == "error":
        raise ValueError("broken")
    time.sleep(60)
"""
    for kind, expected in (("hang", "timed out after 0.3 s in "), ("error", "ValueError: broken")):
        path = tmp_path / f"{kind}.jsonl"
        done = subprocess.run(
            [sys.executable, "-c", program, str(path), kind],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 3, done.stderr
        (message,) = read_messages(path)
        assert message["failure"] == kind
        assert message["reason"].startswith(f"rank 0, a case: {expected}")
