"""The MoE layer benchmark: its report and its options. Speed is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.launch import ROOT, clean_environment
from tools.bench_moe import __main__ as command
from tools.bench_moe.results import AUTO_EP, DEEPSPEED, DENSE, OURS, TORCHTITAN
from tools.bench_moe.shapes import LOADS, QUICK_SHAPES


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Printed output and JSON report of a quick run."""
    out = tmp_path_factory.mktemp("bench") / "moe.json"
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench_moe", "--quick", "--device", "cpu", "--out", str(out)],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_report_header(report: tuple[str, dict[str, Any]]) -> None:
    _, contents = report
    assert contents["quick"] and contents["repeats"] == 2
    assert contents["machine"]["threads"] == 1
    assert contents["limits"]["flops_per_second"] > 0
    assert contents["limits"]["bytes_per_second"] > 0


def test_every_shape_has_all_implementations(report: tuple[str, dict[str, Any]]) -> None:
    _, contents = report
    rows = {row["name"]: row for row in contents["measurements"]}
    for label in (f"{shape.name}, {load}" for shape in QUICK_SHAPES for load in LOADS):
        for name in (OURS, DEEPSPEED, AUTO_EP, DENSE):
            assert rows[f"{label}: {name}"]["value"]["median"] > 0
        assert rows[f"{label}: speed against {DEEPSPEED}"]["unit"] == "x"
        assert rows[f"{label}: time against {DENSE}"]["less_is_better"]
        torchtitan = rows[f"{label}: {TORCHTITAN}"]
        assert torchtitan["value"] is None and "bfloat16" in torchtitan["note"]


def test_raw_results(report: tuple[str, dict[str, Any]]) -> None:
    printed, contents = report
    for result in contents["results"]:
        assert not result["incorrect"]
        assert all(len(seconds) == 2 for seconds in result["seconds"].values())
        for errors in result["errors"].values():
            assert all(error < 1e-5 for error in errors.values())
        assert set(result["errors"][OURS]) == {
            "output",
            "input gradient",
            "gradient of router",
            "gradient of w1",
            "gradient of w2",
            "gradient of w3",
        }
    assert [(result["shape"], result["load"]) for result in contents["results"]] == [
        (shape.name, load) for load in LOADS for shape in QUICK_SHAPES
    ]
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(lines) == len(contents["measurements"]) + 2


def test_unknown_shape_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--quick", "--device", "cpu", "--only", "mnay"]) == 2
    assert "mnay" in capsys.readouterr().err


@pytest.mark.parametrize("repeats", ["-1", "0"])
def test_repeats_must_be_positive(repeats: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--quick", "--device", "cpu", "--repeats", repeats]) == 2
    error = capsys.readouterr().err
    assert f"--repeats is {repeats}" in error and "at least 1" in error


def test_missing_gpu_is_rejected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--quick", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert "no GPU" in error and "--device cpu" in error


def test_help_has_examples() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench_moe", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "--quick" in done.stdout and "examples:" in done.stdout
    assert Path("data/bench/moe.json").name in done.stdout
