"""`vlmoe parity` as a command: with ranks that it starts, and under torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import ROOT, clean_environment, torchrun

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

COMMAND = ["-m", "pretrain", "parity"]


def check(*arguments: str | Path, timeout_seconds: float) -> str:
    """Run the command, which must exit with status 0; returns its standard output."""
    done = subprocess.run(
        [sys.executable, *COMMAND, *map(str, arguments)],
        env=clean_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_run(path: Path, presets: str) -> Path:
    path.write_text(f"extends: {presets}\nname: mine\n", encoding="utf-8")
    return path


def read_json(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def test_several_world_sizes(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run.yaml", "[b16, vmoe]"), tmp_path / "parity.json"
    cases = ["--world-size", "1,2", "--cases", "ep=1,2 zero=1 accum=4"]
    overrides = ["precision.compute=fp32", "optim.lr=1e-3"]
    output = check(run, "--small", *cases, "--out", out, *overrides, timeout_seconds=200)
    assert "4 cases: 3 ok, 1 unsupported" in output

    report = read_json(out)
    by_case = {
        (case["world_size"], case["case"]["expert_parallel_size"]): case for case in report["cases"]
    }
    assert {key: case["status"] for key, case in by_case.items()} == {
        (1, 1): "ok",
        (1, 2): "unsupported",
        (2, 1): "ok",
        (2, 2): "ok",
    }
    assert by_case[2, 2]["reference_stats"]["dropped"] > 0
    differences = by_case[2, 2]["differences"]
    assert {"importance", "weighted/load"} <= differences["term"].keys()
    experts = {f"blocks.1.ffn.experts.w1@{half}" for half in ("0:4", "4:8")}
    assert {"blocks.1.ffn.gate.weight", "log_scale"} | experts <= differences["gradient"].keys()
    assert report["float32_errors"]["run"]["gradient"] < 1e-5


def test_under_torchrun(tmp_path: Path) -> None:
    out = tmp_path / "parity.json"
    options = ["--small", "--cases", "ep=2 zero=1,3", "--out", str(out)]
    done = torchrun([*COMMAND, "tiny", *options], processes=2, timeout_seconds=200).check()
    # The header of the table is printed by one rank only.
    assert done.output.count("result") == 1, done.output

    report = read_json(out)
    assert report["complete"]
    assert [case["status"] for case in report["cases"]] == ["ok", "ok"]
    assert {case["world_size"] for case in report["cases"]} == {2}


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("presets", ["[tiny]", "[s16, limoe]", "[s16, ours]"])
def test_all_cases_of_one_two_and_four_ranks(presets: str, tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run.yaml", presets), tmp_path / "parity.json"
    options = ["--small", "--world-size", "1,2,4", "--out", out, "precision.compute=fp32"]
    check(run, *options, timeout_seconds=2900)

    cases = read_json(out)["cases"]
    num_ok = {
        world_size: sum(
            case["world_size"] == world_size and case["status"] == "ok" for case in cases
        )
        for world_size in (1, 2, 4)
    }
    # Per expert-parallel size: 4 ZeRO stages x 2 accumulations x 2 recompute x 2 precisions, and
    # for each stage three cases: no missing pairs, a missing rank, only auxiliary loss terms.
    assert num_ok == {1: 44, 2: 88, 4: 132}
    assert all(case["reason"] for case in cases if case["status"] != "ok")
