"""Preparing datasets with SLURM job arrays: parts, the final job, and a requeued task."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.order.drop_list import read_drop_list
from tests.support.data_commands import run_data_command
from tests.support.launch import ROOT
from tests.support.shape_dataset import ShapeDataset
from tests.support.slurm import SlurmCluster
from tests.support.small_shards import make_caption, make_png, make_shards

pytestmark = [pytest.mark.e2e, pytest.mark.slurm, pytest.mark.timeout(300)]

ENV = {"VLMOE_PYTHON": sys.executable}
TIMEOUT_SECONDS = 150
SCRIPT = ROOT / "slurm" / "prepare_data.sbatch"


def submit(
    cluster: SlurmCluster, logs: Path, *arguments: str | Path, options: tuple[str, ...] = ()
) -> int:
    """Submit the script with additional options of sbatch; returns the job ID."""
    return cluster.submit(
        *(f"--output={logs}/%A_%a.log", "--cpus-per-task=1", "--kill-on-invalid-dep=yes"),
        *options,
        SCRIPT,
        *arguments,
        env=ENV,
    )


def submit_array_and_final_job(
    cluster: SlurmCluster, logs: Path, tasks: str, *arguments: str | Path
) -> tuple[int, int]:
    """Submit a job array, and the job that completes its work; returns both job IDs."""
    array = submit(cluster, logs, *arguments, options=(f"--array={tasks}",))
    return array, submit(cluster, logs, *arguments, options=(f"--dependency=afterok:{array}",))


def wait_for_output(cluster: SlurmCluster, job: int, logs: Path) -> str:
    return cluster.wait(job, timeout_seconds=TIMEOUT_SECONDS, logs=logs).check(logs).output()


def test_array_indexes_and_final_job_writes_the_manifest(
    slurm_cluster: SlurmCluster, shapes: ShapeDataset, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in shapes.folder.glob("*.tar"):
        shutil.copy(shard, folder)
    _, final = submit_array_and_final_job(slurm_cluster, tmp_path, "1-5:2", "index", folder)
    wait_for_output(slurm_cluster, final, tmp_path)

    expected = json.loads((shapes.folder / "manifest.json").read_text())
    assert json.loads((folder / "manifest.json").read_text())["shards"] == expected["shards"]
    assert len(list(tmp_path.glob("*_[135].log"))) == 3


def test_parts_of_a_comparison_are_combined(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    make_shards(tmp_path / "a", count=20)
    make_shards(tmp_path / "b", count=20, first=15)
    drop_list = tmp_path / "drop.json"
    arguments = (
        *("dedup", tmp_path / "b", "--against", tmp_path / "a"),
        *("--work-dir", tmp_path / "work", "--drop-list", drop_list),
    )
    _, final = submit_array_and_final_job(slurm_cluster, tmp_path, "0-1", *arguments)
    output = wait_for_output(slurm_cluster, final, tmp_path)
    assert "drops 5 of 20 samples" in output
    assert read_drop_list(drop_list).shards["shard-000000.tar"].samples == (0, 1, 2, 3, 4)


def num_shards_of_task_0(out: Path) -> int:
    """How many of its shards (those with even indices) task 0 of 2 has written."""
    records = (out / ".parts").glob("shard-*.tar.json")
    return sum(int(record.name[6:12]) % 2 == 0 for record in records)


def test_requeued_task_resumes(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    count, out, table = 600, tmp_path / "out", tmp_path / "pairs.csv"
    num_shards = count // 5
    (tmp_path / "pics").mkdir()
    rows = ["image,caption"]
    for i in range(count):
        (tmp_path / "pics" / f"{i:04d}.png").write_bytes(make_png(i, side=256))
        rows.append(f"pics/{i:04d}.png,{make_caption(i)}")
    table.write_text("\n".join(rows))
    options = ("--samples-per-shard", "5", "--decode")
    arguments = ("write", "csv", table, *options, "--workers", "0", "--out", out)
    array, final = submit_array_and_final_job(slurm_cluster, tmp_path, "0-1", *arguments)

    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not num_shards_of_task_0(out):
        assert time.monotonic() < deadline, "task 0 wrote nothing"
        time.sleep(0.02)
    slurm_cluster.command("scontrol", "requeue", f"{array}_0")
    assert num_shards_of_task_0(out) < num_shards // 2, "task 0 had ended before it was requeued"
    time.sleep(2.5)
    slurm_cluster.command("scontrol", "update", f"JobId={array}_0", "StartTime=now")

    output = wait_for_output(slurm_cluster, final, tmp_path)
    assert f"{num_shards} shards, {num_shards} of them already written, {count} samples" in output
    log = (tmp_path / f"{array}_0.log").read_text()
    assert "of them already written" in log.splitlines()[-1]

    single = tmp_path / "single"
    run_data_command("write", "csv", table, *options, "--out", single)
    assert (out / "manifest.json").read_bytes() == (single / "manifest.json").read_bytes()


def test_number_of_parts(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    make_shards(tmp_path / "a", count=35)
    arguments = ("check", tmp_path / "a", "--work-dir", tmp_path / "work")
    env = ENV | {"VLMOE_PARTS": "3"}
    log = tmp_path / "part.log"
    job = slurm_cluster.submit(f"--output={log}", "--array=2", SCRIPT, *arguments, env=env)
    slurm_cluster.wait(job, timeout_seconds=TIMEOUT_SECONDS).check()
    assert "part 2/3: 7 samples" in log.read_text()


def test_array_without_command(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    log = tmp_path / "array.log"
    options = (f"--output={log}", "--array=0-1")
    job = slurm_cluster.submit(*options, SCRIPT, tmp_path / "shards", env=ENV)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not log.exists() or "a job array requires a command" not in log.read_text():
        assert time.monotonic() < deadline, f"no error from job {job}"
        time.sleep(0.1)
