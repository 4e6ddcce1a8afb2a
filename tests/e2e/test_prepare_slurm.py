"""Datasets prepared by job arrays of a real SLURM: shares, the job that ends the work, and a task
that is requeued."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.order.drop import read_drop_list
from tests.support.data_commands import data
from tests.support.launch import ROOT
from tests.support.shards import Shapes
from tests.support.slurm import SlurmCluster
from tests.support.small_shards import caption, make_shards, picture

pytestmark = [pytest.mark.e2e, pytest.mark.slurm, pytest.mark.timeout(300)]

_ENV = {"VLMOE_PYTHON": sys.executable}
_PATIENCE_SECONDS = 150
_SCRIPT = ROOT / "slurm" / "prepare_data.sbatch"


def submit(
    cluster: SlurmCluster, logs: Path, *words: str | Path, options: tuple[str, ...] = ()
) -> int:
    return cluster.submit(
        f"--output={logs}/%A_%a.log",
        "--cpus-per-task=1",
        "--kill-on-invalid-dep=yes",
        *options,
        _SCRIPT,
        *words,
        env=_ENV,
    )


def array_then_all(cluster: SlurmCluster, logs: Path, tasks: str, *words: str | Path) -> str:
    """Submit an array and the job that ends its work; what that one says."""
    array = submit(cluster, logs, *words, options=(f"--array={tasks}",))
    last = submit(cluster, logs, *words, options=(f"--dependency=afterok:{array}",))
    return cluster.wait(last, timeout_seconds=_PATIENCE_SECONDS, logs=logs).check(logs).output()


def test_an_array_indexes_and_a_last_job_writes_the_manifest(
    slurm_cluster: SlurmCluster, shapes: Shapes, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in shapes.folder.glob("*.tar"):
        shutil.copy(shard, folder)
    array_then_all(slurm_cluster, tmp_path, "1-5:2", "index", folder)
    written = json.loads((shapes.folder / "manifest.json").read_text())
    assert json.loads((folder / "manifest.json").read_text())["shards"] == written["shards"]
    assert len(list(tmp_path.glob("*_[135].log"))) == 3


def test_shares_of_a_comparison_meet(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    make_shards(tmp_path / "a", count=20)
    make_shards(tmp_path / "b", count=20, first=15)
    said = array_then_all(
        slurm_cluster,
        tmp_path,
        "0-1",
        "dedup",
        tmp_path / "b",
        "--against",
        tmp_path / "a",
        "--work",
        tmp_path / "work",
        "--drop-list",
        tmp_path / "drop.json",
    )
    assert "drops 5 of 20 samples" in said
    assert read_drop_list(tmp_path / "drop.json").shards["shard-000000.tar"].samples == (
        0,
        1,
        2,
        3,
        4,
    )


def test_a_requeued_task_goes_on(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    count, out = 600, tmp_path / "out"
    (tmp_path / "pics").mkdir()
    lines = ["image,caption"]
    for number in range(count):
        (tmp_path / "pics" / f"{number:04d}.png").write_bytes(picture(number, side=256))
        lines.append(f"pics/{number:04d}.png,{caption(number)}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    words = (
        "write",
        "csv",
        tmp_path / "pairs.csv",
        "--samples-per-shard",
        "5",
        "--workers",
        "0",
        "--decode",
    )
    array = submit(slurm_cluster, tmp_path, *words, "--out", out, options=("--array=0-1",))
    last = submit(
        slurm_cluster, tmp_path, *words, "--out", out, options=(f"--dependency=afterok:{array}",)
    )

    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not any(
        int(note.name[6:12]) % 2 == 0 for note in (out / ".parts").glob("shard-*.tar.json")
    ):
        assert time.monotonic() < deadline, "task 0 wrote nothing"
        time.sleep(0.02)
    slurm_cluster.command("scontrol", "requeue", f"{array}_0")
    done = sum(int(note.name[6:12]) % 2 == 0 for note in (out / ".parts").glob("shard-*.tar.json"))
    assert done < count // 5 // 2, "the task was requeued too late to prove anything"
    time.sleep(2.5)
    slurm_cluster.command("scontrol", "update", f"JobId={array}_0", "StartTime=now")

    said = (
        slurm_cluster.wait(last, timeout_seconds=_PATIENCE_SECONDS, logs=tmp_path)
        .check(tmp_path)
        .output()
    )
    assert f"{count // 5} shards, {count // 5} of them already there, {count} samples" in said
    log = (tmp_path / f"{array}_0.log").read_text()
    assert "of them already there" in log.splitlines()[-1]
    data(
        "write",
        "csv",
        tmp_path / "pairs.csv",
        "--out",
        tmp_path / "alone",
        "--samples-per-shard",
        5,
        "--decode",
    )
    assert (out / "manifest.json").read_bytes() == (
        tmp_path / "alone" / "manifest.json"
    ).read_bytes()


def test_a_share_is_named_by_the_number_of_shares(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    make_shards(tmp_path / "a", count=35)
    line = ("check", tmp_path / "a", "--work", tmp_path / "work")
    job = slurm_cluster.submit(
        f"--output={tmp_path}/one.log", "--array=2", _SCRIPT, *line, env=_ENV | {"VLMOE_PARTS": "3"}
    )
    slurm_cluster.wait(job, timeout_seconds=_PATIENCE_SECONDS).check()
    assert "part 2/3: 7 samples" in (tmp_path / "one.log").read_text()
    refused = slurm_cluster.submit(
        f"--output={tmp_path}/no.log", "--array=0-1", _SCRIPT, tmp_path / "a", env=_ENV
    )
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while "a job array needs a command" not in (
        text := (tmp_path / "no.log").read_text() if (tmp_path / "no.log").exists() else ""
    ):
        assert time.monotonic() < deadline, f"job {refused}: {text}"
        time.sleep(0.1)
