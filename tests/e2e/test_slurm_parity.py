"""slurm/parity.sbatch: ranks on two nodes compared with a single process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.launch import ROOT
from tests.support.slurm import SlurmCluster

pytestmark = [pytest.mark.e2e, pytest.mark.slurm, pytest.mark.timeout(300)]


def test_ranks_on_two_nodes(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    out = tmp_path / "check"
    script = ROOT / "slurm" / "parity.sbatch"
    job = slurm_cluster.submit(
        *(f"--output={tmp_path}/batch.log", script, "tiny", out),
        *("--small", "--cases", "ep=2 zero=1,3"),
        cwd=ROOT,
        env={"VLMOE_PYTHON": sys.executable, "VLMOE_PROCESSES_PER_NODE": "1"},
    )
    slurm_cluster.wait(job, timeout_seconds=240).check(out / "logs")

    report = json.loads((out / "parity.json").read_text(encoding="utf-8"))
    assert report["complete"]
    cases = [(case["world_size"], case["status"]) for case in report["cases"]]
    assert cases == [(2, "ok"), (2, "ok")]
    logs = {path.name: path.read_text(encoding="utf-8") for path in (out / "logs").iterdir()}
    assert "2 cases: 2 ok" in logs[f"{job}-node0.log"] and "result" not in logs[f"{job}-node1.log"]
