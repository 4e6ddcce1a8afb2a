"""The GPU suite on the CPU: every part runs, a failing check is found and told, and time is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.moe import dispatch, statistics
from tests.support.launch import ROOT, clean_environment
from tools.benchmark import Quartiles
from tools.figures import Figure, skipped
from tools.gpu_suite import __main__ as command
from tools.gpu_suite import numbers, runs, synchronisations
from tools.gpu_suite.layers import WAYS
from tools.gpu_suite.options import Options
from tools.gpu_suite.results import HEAD, Check, Report, at_most, figure_row


def options(scratch: Path) -> Options:
    return Options(device=torch.device("cpu"), deadline=time.monotonic() + 100, scratch=scratch)


def suite(*words: str, timeout: int = 200) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tools.gpu_suite", *words], cwd=ROOT, env=clean_environment(),
                          capture_output=True, text=True, timeout=timeout, check=False)


# --- it runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    out = tmp_path_factory.mktemp("suite") / "gpu.json"
    done = suite("--cpu", "--out", str(out))
    return done, json.loads(out.read_text())


def test_every_part_runs_and_passes(everything: tuple[subprocess.CompletedProcess[str], dict[str, Any]]) -> None:
    done, found = everything
    assert done.returncode == 0 and found["failed"] == [], done.stdout + done.stderr
    assert list(found["parts"]) == list(command.PARTS) == list(found["seconds"])
    parts = found["parts"]
    assert all(part["checks"] and not part["skipped"] for part in parts.values())
    assert len(parts["layer"]["checks"]) == len(parts["waits"]["checks"]) == len(WAYS)
    assert {"loss contrastive", "gradient norm"} <= {c["name"].rpartition(": ")[2] for c in parts["step"]["checks"]}
    assert any("DeepSpeed" in line["name"] for line in parts["speed"]["figures"])
    for preset in ("tiny", "s16"):
        lines = {line["name"]: line for line in parts[preset]["figures"]}
        assert lines[f"{preset}: samples a second"]["value"]["median"] > 0
        assert lines[f"{preset}: model FLOPs utilisation"]["note"]


def test_the_table_comes_last(everything: tuple[subprocess.CompletedProcess[str], dict[str, Any]]) -> None:
    done, found = everything
    lines = done.stdout.rstrip().splitlines()
    first = lines.index(next(line for line in lines if line.startswith("| part")))
    assert all(line.startswith("| ") for line in lines[first:])
    results = sum(len(part["checks"]) + len(part["figures"]) for part in found["parts"].values())
    assert len(lines) - first == results + 2
    assert "the figures mean nothing" in done.stdout  # there was no GPU


def test_an_unknown_part_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "layr"]) == 2
    assert "layr" in capsys.readouterr().err


# --- what is wrong is found ------------------------------------------------------------------------------------


def test_a_wrong_gradient_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dispatch._WeightedSum.backward

    def wrong(ctx: Any, grad_TD: torch.Tensor) -> Any:
        rows, weights, nothing = right(ctx, grad_TD)
        return rows * (1.1 if grad_TD.dtype == torch.bfloat16 else 1.0), weights, nothing

    report = Report()
    monkeypatch.setattr(dispatch._WeightedSum, "backward", staticmethod(wrong))
    numbers.layer_numbers(options(tmp_path), report)
    assert report.checks and not any(check.passed for check in report.checks)


def test_a_read_by_the_host_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = statistics._by_modality

    def reading(values: torch.Tensor, split: int) -> torch.Tensor:
        return right(values * float(values.sum() > 0), split)

    monkeypatch.setattr(statistics, "_by_modality", reading)
    report = Report()
    synchronisations.synchronisations(options(tmp_path), report)
    assert not any(check.passed for check in report.checks)
    assert "_local_scalar_dense" in report.checks[0].note


def test_reads_are_operations_whose_answer_the_host_needs() -> None:
    x = torch.arange(6)
    with synchronisations.HostReads() as reads:
        x.cumsum(0), x.argsort(), x[torch.tensor([1, 2])], torch.where(x > 2, x, 0)
    assert reads.seen == []
    with synchronisations.HostReads() as reads:
        x[x > 2], x.nonzero(), x.sum().item()
    assert len(reads.seen) >= 3


def test_a_failed_check_gives_exit_1_and_a_part_that_is_not_installed_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = command._parse(["--cpu", "--out", str(tmp_path / "gpu.json")])
    left_out = Report(skipped="obstore is not installed")
    assert command.tell({"layer": Report(checks=[at_most("fine", 0.1, 1)]), "s16": left_out}, {}, given) == 0
    assert "obstore is not installed" in capsys.readouterr().out
    assert command.tell({"layer": Report(checks=[at_most("not", float("nan"), 1)])}, {}, given) == 1
    assert json.loads((tmp_path / "gpu.json").read_text())["failed"] == ["layer: not"]


# --- time is kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "told"), [("time.sleep(60)", "did not end within"), ("sys.exit(3)", "status 3")])
def test_a_part_that_crashes_or_takes_too_long_fails_and_keeps_what_it_had(
    ending: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "layer.json"
    script = (f"import sys, time; from pathlib import Path; from tools.gpu_suite.results import Check, Report; "
              f"Report(path=Path({str(path)!r})).add(Check(name='one', passed=True)); {ending}")
    monkeypatch.setattr(command, "_command", lambda *given: [sys.executable, "-c", script])
    monkeypatch.setattr(command, "GRACE_SECONDS", 2.0)
    monkeypatch.chdir(ROOT)
    started = time.monotonic()
    report = command.run_part("layer", 1.0, tmp_path, command._parse(["--cpu"]))
    assert time.monotonic() - started < 20
    assert [check.name for check in report.checks] == ["one", "runs to its end"]
    assert not report.checks[1].passed and told in report.checks[1].note


def test_without_time_left_parts_are_named(tmp_path: Path) -> None:
    done = suite("--cpu", "--seconds", "5", "--out", str(tmp_path / "gpu.json"), timeout=60)
    assert done.returncode == 0
    assert done.stdout.count("no time left") == len(command.PARTS)


def test_budgets_fit_into_nine_minutes() -> None:
    assert sum(part.seconds for part in command.PARTS.values()) <= command.TOTAL_SECONDS < 540


# --- results ---------------------------------------------------------------------------------------------------


def test_a_report_is_the_same_after_its_file(tmp_path: Path) -> None:
    report = Report(path=tmp_path / "part.json")
    report.add(Check(name="a", passed=True, note="b"), Figure(name="c", value=Quartiles(1, 2, 3), floor=1.5))
    report.add(skipped("d", "no reason"))
    again = Report.from_json(json.loads((tmp_path / "part.json").read_text()))
    assert (again.checks, again.figures, again.skipped) == (report.checks, report.figures, "")
    rows = [check.row("x") for check in again.checks] + [figure_row("x", line) for line in again.figures]
    assert all(len(row) == len(HEAD) for row in rows)
    assert rows[1][3:5] == ["at least 1.50", "floor"] and rows[2][4:] == ["not measured", "no reason"]


def test_the_journal_of_a_run_that_was_ended_is_read_to_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"perf/samples_per_second": speed, "perf/mfu": 0.3} for speed in (1.0, 2.0, 30.0, 40.0)]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"perf/samples_per')
    lines = {line.name: line for line in runs.run_figures("s16", runs.read_rows(path))}
    speed = lines["s16: samples a second"].value
    assert speed is not None and speed.median == 35.0  # without the start
    share = lines["s16: model FLOPs utilisation"].value
    assert share is not None and share.median == pytest.approx(30)
    assert lines["s16: memory"].value is None
    assert runs.read_rows(tmp_path / "none.jsonl") == []
