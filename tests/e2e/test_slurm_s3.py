"""Training on two SLURM nodes with shards in an S3 server, through a crash and a cancellation."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pretrain.train.jsonl import read_rows
from tests.support.s3_server import S3Server
from tests.support.shape_dataset import ShapeDataset
from tests.support.slurm import Job, SlurmCluster

pytestmark = [pytest.mark.e2e, pytest.mark.slurm, pytest.mark.s3, pytest.mark.timeout(400)]

STEPS, CHECKPOINT_EVERY = 150, 10
# A start takes 10 s on an idle machine with two cores, and much longer on a busy one.
TIMEOUT_SECONDS = 120
SETTINGS = f"""
    model.width=32 model.num_layers=2 model.fusion_layer=1 model.num_heads=2 model.ffn_width=32
    model.image_size=16 model.context_length=16 model.embed_dim=16 model.pool_heads=2
    moe.num_experts=4 moe.expert_width=16 moe.shared_experts=0
    parallel.expert_parallel_size=2 parallel.timeout_seconds=60
    batch.global_batch_size=8 batch.micro_batch_size=4
    schedule.total_steps={STEPS} schedule.warmup_steps=2 checkpoint.every_steps={CHECKPOINT_EVERY}
    log.every_steps=1 log.captions_every_steps=0 eval.caption_samples=8
    data.workers=1 data.timeout_seconds=60 data.shard_seconds=30
""".split()


@dataclass(frozen=True, kw_only=True)
class ClusterRun:
    """A run folder and the cluster that trains in it."""

    cluster: SlurmCluster
    folder: Path
    env: dict[str, str]

    def submit(self, settings: list[str]) -> int:
        return self.cluster.submit(
            *("--nodes=2", "--cpus-per-task=2", f"--output={self.folder.parent}/batch-%j.log"),
            *("slurm/pretrain.sbatch", "tiny", str(self.folder), *SETTINGS, *settings),
            env=self.env | {"VLMOE_PYTHON": sys.executable},
        )

    def evaluate(self, shards: str, results: Path) -> int:
        return self.cluster.submit(
            *(f"--output={self.folder.parent}/batch-%j.log", "slurm/evaluate.sbatch", self.folder),
            *("--shards", shards, "--json", results),
            env=self.env | {"VLMOE_PYTHON": sys.executable},
        )

    def wait(self, job_id: int) -> Job:
        logs = self.folder / "logs"
        return self.cluster.wait(job_id, timeout_seconds=TIMEOUT_SECONDS, logs=logs)

    def wait_until(self, job_id: int, condition: Callable[[], bool], what: str) -> None:
        self.cluster.wait_until(
            job_id,
            lambda _: condition(),
            what=what,
            timeout_seconds=TIMEOUT_SECONDS,
            logs=self.folder / "logs",
        )

    @property
    def latest_step(self) -> int:
        """Step of the newest checkpoint; 0 if there is none."""
        latest = self.folder / "checkpoints" / "latest"
        return int(latest.read_text().strip().removeprefix("step-")) if latest.exists() else 0

    def rows(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl, without an incomplete last line of a killed job."""
        return read_rows(self.folder / "metrics.jsonl")

    def log(self, job_id: int, *, node: int) -> str:
        return (self.folder / "logs" / f"{job_id}-node{node}.log").read_text()


def test_training_through_crash_and_cancellation(
    slurm_cluster: SlurmCluster, s3_server: S3Server, shapes: ShapeDataset, tmp_path: Path
) -> None:
    shards = s3_server.upload(shapes.folder, "slurm-e2e")
    run = ClusterRun(cluster=slurm_cluster, folder=tmp_path / "run", env=s3_server.env)
    settings = [
        f"data.train=[{shards}]",
        f"data.tokenizer={shapes.tokenizer}",
        f"model.vocab_size={shapes.vocab_size}",
    ]

    # A rank is killed, as on a lost node: the job fails, and the last checkpoint stays.
    crashed = run.submit(settings)
    run.wait_until(crashed, lambda: run.latest_step > 0, "write a checkpoint")
    slurm_cluster.kill_rank(crashed, 1)
    assert run.wait(crashed).state == "FAILED"
    crash_step, crashed_rows = run.latest_step, run.rows()
    assert crash_step % CHECKPOINT_EVERY == 0

    # A canceled job finishes its step and saves a checkpoint.
    canceled = run.submit(settings)
    resumed_step = crashed_rows[-1]["step"] + 2
    run.wait_until(canceled, lambda: run.rows()[-1]["step"] > resumed_step, "resume")
    slurm_cluster.cancel(canceled)
    assert run.wait(canceled).state == "CANCELLED"
    cancel_step = run.latest_step
    assert f"step {crash_step}," in run.log(canceled, node=0), "the log has no resumed step"
    assert crash_step < cancel_step < STEPS, "the job had ended before it was canceled"
    assert cancel_step == run.rows()[-1]["step"], "the checkpoint is not of the last step"

    final = run.submit(settings)
    run.wait(final).check(run.folder / "logs")
    assert run.latest_step == STEPS
    assert f"step {cancel_step}," in run.log(final, node=0)
    check_rows(run.rows(), crashed_rows, crash_step)
    check_run_folder(run.folder, [crashed, canceled, final])

    evaluation = run.evaluate(shards, tmp_path / "eval.json")
    run.wait(evaluation).check(run.folder / "logs")
    assert json.loads((tmp_path / "eval.json").read_text())


def check_rows(
    rows: list[dict[str, Any]], crashed_rows: list[dict[str, Any]], crash_step: int
) -> None:
    """Each step has one row; steps repeated after the crash have equal losses."""
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    crashed_losses = {row["step"]: row["loss/total"] for row in crashed_rows}
    assert max(crashed_losses) >= crash_step
    losses = {row["step"]: row["loss/total"] for row in rows}
    assert {step: losses[step] for step in crashed_losses} == crashed_losses

    first, last = (sum(row["loss/total"] for row in part) / 10 for part in (rows[:10], rows[-10:]))
    assert last < 0.8 * first, f"the mean loss went from {first} to {last}"


def check_run_folder(folder: Path, jobs: list[int]) -> None:
    """Logs, resolved settings, events and checkpoints exist, and contain no secret."""
    logs = {path.name: path.read_text() for path in (folder / "logs").iterdir()}
    assert {f"{job}{node}.log" for job in jobs for node in ("", "-node0", "-node1")} <= logs.keys()
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "deepspeed.json", "tokenizer.model"} <= names
    assert list((folder / "tensorboard").rglob("events.*"))

    # Both ranks write their part of the state.
    final = folder / "checkpoints" / f"step-{STEPS:08d}"
    assert len(list(final.glob("state-*.safetensors"))) == 2
    assert "testsecret" not in "".join(logs.values()) + (folder / "config.yaml").read_text()
