"""The cluster's way, whole: two nodes of a real SLURM train on shards in a real S3 server, die, and go on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import ROOT
from tests.support.s3_server import S3Server
from tests.support.shards import Shapes
from tests.support.slurm import Job, SlurmCluster

pytestmark = [pytest.mark.e2e, pytest.mark.slurm, pytest.mark.s3, pytest.mark.timeout(240)]

_STEPS, _CHECKPOINT_EVERY = 60, 5
_SETTINGS = [
    *("model.width=32", "model.num_blocks=2", "model.fusion_start=1", "model.num_heads=2", "model.ffn_width=32"),
    *("model.image_size=16", "model.text_length=16", "model.embed_dim=16", "model.pool_heads=2"),
    *("moe.num_experts=4", "moe.expert_width=16", "moe.shared_experts=0", "parallel.expert_parallel=2"),
    *("batch.pairs_per_step=8", "batch.pairs_per_forward=4", f"schedule.total_steps={_STEPS}"),
    *("schedule.warmup_steps=2", f"checkpoint.every_steps={_CHECKPOINT_EVERY}", "log.every_steps=1"),
    *("log.pictures_every_steps=0", "data.workers=1", "parallel.timeout_seconds=60", "data.timeout_seconds=60"),
]


def test_trains_on_two_nodes_from_s3_and_goes_on_after_being_killed(
    slurm_cluster: SlurmCluster, s3_server: S3Server, shapes: Shapes, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    train = s3_server.upload(shapes.folder, "slurm-e2e")

    first = _submit(slurm_cluster, s3_server, shapes, train, run_dir)
    slurm_cluster.wait_until(
        first, lambda job: _latest_step(run_dir) > 0, timeout_seconds=90, what="write a checkpoint"
    )
    slurm_cluster.cancel(first, signal="KILL")  # as a lost node would: nobody gets to tidy up
    slurm_cluster.wait(first, timeout_seconds=30)
    saved, seen = _latest_step(run_dir), _rows(run_dir)
    assert saved % _CHECKPOINT_EVERY == 0 and saved < _STEPS, "the job was killed too late to prove anything"

    second = _submit(slurm_cluster, s3_server, shapes, train, run_dir)
    _check(slurm_cluster.wait(second, timeout_seconds=90), run_dir)
    rows = _rows(run_dir)
    assert _latest_step(run_dir) == _STEPS
    assert f"step {saved}," in _log(run_dir, second, node=0), "the second job did not say where it goes on"
    _check_rows(rows, seen, saved)
    _check_folder(run_dir, [first, second])
    assert "testsecret" not in "".join(file.read_text() for file in (run_dir / "logs").iterdir())

    third = _submit(slurm_cluster, s3_server, shapes, train, run_dir)
    _check(slurm_cluster.wait(third, timeout_seconds=60), run_dir)
    assert _rows(run_dir) == rows, "a complete run was trained further"


def _submit(cluster: SlurmCluster, server: S3Server, shapes: Shapes, train: str, run_dir: Path) -> int:
    data = [f"data.train=[{train}]", f"data.tokenizer={shapes.tokenizer}", f"model.vocab_size={shapes.vocab_size}"]
    return cluster.submit(
        *("--nodes=2", "--cpus-per-task=2", f"--output={run_dir.parent}/batch-%j.log"),
        *("slurm/pretrain.sbatch", "tiny", run_dir, *_SETTINGS, *data),
        env=server.env | {"VLMOE_PYTHON": sys.executable}, cwd=ROOT,
    )  # fmt: skip


def _check(job: Job, run_dir: Path) -> None:
    """The job is COMPLETED, else fail with what the nodes said."""
    if job.state != "COMPLETED":
        logs = [f"--- {file.name}\n{file.read_text()[-3000:]}" for file in sorted((run_dir / "logs").iterdir())]
        pytest.fail(f"job {job.job_id} is {job.state} ({job.exit_code}), not COMPLETED\n" + "\n".join(logs))


def _check_rows(rows: list[dict[str, Any]], seen: list[dict[str, Any]], saved: int) -> None:
    """Every step stands in metrics.jsonl; one that was trained twice gave the same loss both times."""
    loss_of = {row["step"]: row["loss/total"] for row in seen}
    assert {1, saved} <= loss_of.keys()
    assert [row["step"] for row in rows if row["step"] <= saved] == list(range(1, saved + 1))
    assert sorted({row["step"] for row in rows}) == list(range(1, _STEPS + 1))
    again = [row for row in rows if row["step"] in loss_of]
    assert all(row["loss/total"] == loss_of[row["step"]] for row in again)
    first, last = rows[0]["loss/total"], rows[-1]["loss/total"]
    assert last < first, f"nothing was learned: the loss went from {first} to {last}"


def _check_folder(run_dir: Path, jobs: list[int]) -> None:
    """Logs of both nodes, resolved settings, events and checkpoints are there."""
    logs = {file.name for file in (run_dir / "logs").iterdir()}
    assert {f"{job}{node}.log" for job in jobs for node in ("", "-node0", "-node1")} <= logs
    assert {"config.yaml", "deepspeed.json", "tokenizer.model"} <= {file.name for file in run_dir.iterdir()}
    assert list((run_dir / "tensorboard").rglob("events.*"))
    final = run_dir / "checkpoints" / f"step-{_STEPS:08d}"
    assert len(list(final.glob("model-*.safetensors"))) == 2, "with expert parallelism 2 both ranks hold experts"
    assert len(list(final.glob("optimizer-*.safetensors"))) == 2


def _latest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint, 0 when there is none."""
    latest = run_dir / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step-")) if latest.exists() else 0


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl; a killed job may leave half a line."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _log(run_dir: Path, job: int, *, node: int) -> str:
    return (run_dir / "logs" / f"{job}-node{node}.log").read_text()
