"""slurm/check_parallel.sbatch on a real SLURM: ranks of two nodes against one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.launch import ROOT
from tests.support.slurm import SlurmCluster

pytestmark = [pytest.mark.e2e, pytest.mark.slurm, pytest.mark.timeout(300)]


def test_ranks_of_two_nodes_are_compared_with_one_process(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    out = tmp_path / "check"
    job = slurm_cluster.submit(
        f"--output={tmp_path}/batch.log",
        ROOT / "slurm" / "check_parallel.sbatch",
        "tiny",
        out,
        "--small",
        "--cells",
        "ep=2 zero=1,3",
        cwd=ROOT,
        env={"VLMOE_PYTHON": sys.executable, "VLMOE_PROCESSES_PER_NODE": "1"},
    )
    slurm_cluster.wait(job, timeout_seconds=240).check(out / "logs")
    found = json.loads((out / "parity.json").read_text(encoding="utf-8"))
    assert found["complete"] and [(c["world_size"], c["status"]) for c in found["cells"]] == [
        (2, "ok"),
        (2, "ok"),
    ]
    logs = {file.name: file.read_text(encoding="utf-8") for file in (out / "logs").iterdir()}
    assert "2 cells: 2 ok" in logs[f"{job}-node0.log"] and "verdict" not in logs[f"{job}-node1.log"]
