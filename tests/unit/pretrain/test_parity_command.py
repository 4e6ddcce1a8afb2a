"""`vlmoe parity`: exit status, JSON report, rejected runs, failing ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli.main import main
from pretrain.parallel.environment import rank_environment
from pretrain.parallel.errors import LayoutError
from pretrain.parity import command
from pretrain.parity.cases import Case
from pretrain.parity.job import Job, Result, case_message
from pretrain.parity.launch import launch_local_ranks
from tests.unit.pretrain.parity_support import changed_trace, make_result


def launcher_with(*results: Result) -> Callable[..., None]:
    """A replacement for `launch_local_ranks` that reports these results."""

    def launch(job: Job, world_size: int, on_message: Callable[[dict[str, Any]], None]) -> None:
        for index, result in enumerate(results):
            on_message(case_message(index, result))
        on_message({"float32_error": {"gradient": 2e-6}, "run": "run"})

    return launch


MISMATCH = make_result("mismatch", changed_trace("0/loss/total", lambda t: t * 2))


@pytest.mark.parametrize(
    ("results", "status"),
    [
        ((make_result(),), 0),
        ((make_result(), make_result("unsupported", reason="no")), 0),
        ((make_result(), MISMATCH), 1),
        ((make_result(), make_result("hang", reason="late")), 1),
        ((make_result(), make_result("error", reason="broken")), 1),
        ((make_result(), make_result("not-run", reason="three failures")), 1),
        ((make_result("unsupported", reason="no"),), 2),
    ],
)
def test_exit_status_and_json_report(
    results: tuple[Result, ...],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "launch_local_ranks", launcher_with(*results))
    out = tmp_path / "parity.json"
    arguments = ["tiny", "--small", "--world-size", "2", "--cases", "zero=1", "--out", str(out)]
    assert main(["parity", *arguments]) == status

    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["complete"]
    assert [case["status"] for case in report["cases"]] == [result.status for result in results]
    assert report["tolerances"]["loss"] == {"fp32": 1e-5, "bf16": 5e-3}
    assert report["float32_errors"] == {"run": {"gradient": 2e-6}}
    count = "1 case: " if len(results) == 1 else f"{len(results)} cases: "
    assert count in capsys.readouterr().out


def test_unsupported_cases_start_no_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "launch_local_ranks", None)
    arguments = ["tiny", "--small", "--world-size", "2", "--cases", "ep=3,5"]
    assert main(["parity", *arguments]) == 2
    printed, error = capsys.readouterr()
    assert error.startswith("error: ") and "--cases" in error
    assert printed.count("unsupported: parallel.expert_parallel_size is") == 2
    assert "No case was compared" in printed


@pytest.mark.parametrize(
    ("arguments", "message", "prints_table"),
    [
        (["--cases", "zeros=1"], "'zeros'", False),
        (["balance.load_weight=0.1"], "balance.load_weight is 0.1", True),
        (["optim.lr=-1"], "optim.lr is -1", True),
    ],
)
def test_an_invalid_run_is_an_error(
    arguments: list[str], message: str, prints_table: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", "tiny", "--small", *arguments]) == 2
    printed, error = capsys.readouterr()
    assert message in error
    assert prints_table or not printed


def test_srun_tasks_without_torchrun_are_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    monkeypatch.setattr(command, "launch_local_ranks", None)
    assert main(["parity", "tiny", "--small"]) == 2
    error = capsys.readouterr().err
    assert "srun" in error and "16 tasks" in error
    with pytest.raises(LayoutError, match="torchrun"):
        rank_environment()

    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert rank_environment().world_size == 1


@pytest.mark.parametrize(
    "arguments",
    [["--world-size", "0"], ["--world-size", "2,x"], ["--timeout", "0"], ["--pairs", "-4"]],
)
def test_invalid_numbers_are_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["parity", "tiny", *arguments])


def test_after_three_failures_the_remaining_cases_are_not_run(tmp_path: Path) -> None:
    job = Job(runs={}, cases=(Case(),) * 5, pairs=8, folder=str(tmp_path), seconds=5)
    messages: list[dict[str, Any]] = []
    worker = ["-c", "raise SystemExit('no such module')"]
    launch_local_ranks(job, 2, messages.append, worker=worker)

    results = [Result.from_json(message["result"]) for message in messages]
    assert [result.status for result in results] == ["error"] * 3 + ["not-run"] * 2
    assert "no such module" in results[0].reason
