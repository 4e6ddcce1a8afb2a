"""slurm/common.sh: ranks and nodes, arguments of the ranks, and errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.content.tokenizer import Tokenizer
from tests.support.launch import ROOT, clean_environment
from tests.support.shape_dataset import ShapeDataset
from tests.support.slurm import SlurmCluster

pytestmark = [pytest.mark.e2e, pytest.mark.slurm, pytest.mark.timeout(120)]

BATCH_SCRIPT = """#!/usr/bin/env bash
set -euo pipefail
source "$VLMOE_HOME/slurm/common.sh"
use_log_folder "$1/logs"
torchrun_on_all_nodes "$1/logs" -m tests.support.rank_report "$@"
"""
ENV = {"VLMOE_HOME": str(ROOT), "VLMOE_PYTHON": sys.executable}


def test_ranks_nodes_and_arguments(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    folder, script = tmp_path / "a run, 100%", tmp_path / "batch.sh"
    folder.mkdir()
    script.write_text(BATCH_SCRIPT)
    arguments = ["two words", "$HOME `id` $(id) 'x' \"y\"", "data.train=[s3://a/b, c]", "*"]
    job = slurm_cluster.submit(
        *("--nodes=2", "--cpus-per-task=2", f"--output={tmp_path}/batch.log"),
        *(script, folder, *arguments),
        env=ENV | {"VLMOE_PROCESSES_PER_NODE": "2", "AWS_SECRET_ACCESS_KEY": "secret-key"},
    )
    slurm_cluster.wait(job, timeout_seconds=90).check()

    reports = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(4)]
    nodes = [(report["node"], report["local_rank"]) for report in reports]
    assert nodes == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [report["name"] for report in reports] == ["node1", "node1", "node2", "node2"]
    assert {(report["world_size"], report["rank_sum"]) for report in reports} == {(4, 6)}
    assert all(report["arguments"] == arguments for report in reports)

    logs = {path.name: path.read_text() for path in (folder / "logs").iterdir()}
    assert set(logs) == {f"{job}.log", f"{job}-node0.log", f"{job}-node1.log"}
    assert "2 node(s) x 2 process(es), rank 0 on node1:" in logs[f"{job}.log"]
    assert "secret-key" not in "".join(logs.values()) + (tmp_path / "batch.log").read_text()


def test_submission_outside_the_checkout(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    job = slurm_cluster.submit(ROOT / "slurm" / "pretrain.sbatch", "tiny", "run", cwd=tmp_path)
    done = slurm_cluster.wait(job, timeout_seconds=20)
    assert (done.state, done.exit_code) == ("FAILED", "2:0")
    assert f"{tmp_path}/slurm/common.sh" in done.output() and "VLMOE_HOME" in done.output()


def test_failed_rank_ends_the_job(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    script = tmp_path / "batch.sh"
    script.write_text(BATCH_SCRIPT.replace("support.rank_report", "support.fail_on_last_rank"))
    job = slurm_cluster.submit(
        *("--nodes=2", f"--output={tmp_path}/batch.log", script, tmp_path), env=ENV
    )
    # Rank 0 would sleep for ten minutes.
    assert slurm_cluster.wait(job, timeout_seconds=60).state == "FAILED"


def test_prepare_data_indexes_shards_and_trains_a_tokenizer(
    slurm_cluster: SlurmCluster, shapes: ShapeDataset, tmp_path: Path
) -> None:
    folder, tokenizer = tmp_path / "shards", tmp_path / "t.model"
    folder.mkdir()
    for shard in shapes.folder.glob("*.tar"):
        shutil.copy(shard, folder)
    job = slurm_cluster.submit(
        *(f"--output={tmp_path}/batch.log", "slurm/prepare_data.sbatch"),
        *(folder, tokenizer, str(shapes.vocab_size)),
        env={"VLMOE_PYTHON": sys.executable},
    )
    slurm_cluster.wait(job, timeout_seconds=60).check()

    # The expected manifest was written together with the shards.
    expected = json.loads((shapes.folder / "manifest.json").read_text())
    assert json.loads((folder / "manifest.json").read_text())["shards"] == expected["shards"]
    assert Tokenizer.load(tokenizer).vocab_size == shapes.vocab_size


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ("", "1 1 1"),
        ("SLURM_CPUS_ON_NODE=12", "1 12 12"),
        ("SLURM_GPUS_ON_NODE=4 SLURM_CPUS_ON_NODE=32", "4 32 8"),
        ("SLURM_GPUS_ON_NODE=4 SLURM_CPUS_ON_NODE=32 SLURM_CPUS_PER_TASK=16", "4 16 4"),
        ("SLURM_GPUS_ON_NODE=4 VLMOE_PROCESSES_PER_NODE=2", "2 1 1"),
        ("SLURM_CPUS_ON_NODE=12 OMP_NUM_THREADS=3", "1 12 3"),
    ],
)
def test_processes_and_threads_of_an_allocation(variables: str, expected: str) -> None:
    shell = (
        "source slurm/common.sh; set_python_environment; "
        'echo "$(processes_per_node) $(cpus_per_node) $OMP_NUM_THREADS"'
    )
    environment = clean_environment()
    del environment["OMP_NUM_THREADS"]
    environment |= dict(variable.split("=") for variable in variables.split())
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shell],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected
