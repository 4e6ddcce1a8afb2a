"""The cluster's way, whole: two nodes of a real SLURM train on shards in a real S3 server, die, and
go on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.s3_server import S3Server
from tests.support.shards import Shapes
from tests.support.slurm import Job, SlurmCluster

pytestmark = [pytest.mark.e2e, pytest.mark.slurm, pytest.mark.s3, pytest.mark.timeout(400)]

_STEPS, _CHECKPOINT_EVERY = 150, 10
_PATIENCE_SECONDS = (
    120  # a start takes 10 s on a quiet machine of two cores, and much longer on a busy one
)
_SETTINGS = [
    *(
        "model.width=32",
        "model.num_layers=2",
        "model.fusion_layer=1",
        "model.num_heads=2",
        "model.ffn_width=32",
    ),
    *("model.image_size=16", "model.context_length=16", "model.embed_dim=16", "model.pool_heads=2"),
    *(
        "moe.num_experts=4",
        "moe.expert_width=16",
        "moe.shared_experts=0",
        "parallel.expert_parallel_size=2",
    ),
    *("batch.global_batch_size=8", "batch.micro_batch_size=4", f"schedule.total_steps={_STEPS}"),
    *(
        "schedule.warmup_steps=2",
        f"checkpoint.every_steps={_CHECKPOINT_EVERY}",
        "log.every_steps=1",
    ),
    *("log.captions_every_steps=0", "data.workers=1", "eval.caption_samples=8"),
    *("parallel.timeout_seconds=60", "data.timeout_seconds=60", "data.shard_seconds=30"),
]


def test_trains_on_two_nodes_from_s3_and_goes_on_after_a_crash_and_a_cancellation(
    slurm_cluster: SlurmCluster, s3_server: S3Server, shapes: Shapes, tmp_path: Path
) -> None:
    data = s3_server.upload(shapes.folder, "slurm-e2e")
    run = _Run(cluster=slurm_cluster, folder=tmp_path / "run", env=s3_server.env)
    line = [
        f"data.train=[{data}]",
        f"data.tokenizer={shapes.tokenizer}",
        f"model.vocab_size={shapes.vocab_size}",
    ]

    # A rank dies without a word, as on a lost node: the job fails, the last checkpoint stays.
    crashed = run.submit(line)
    run.wait_until(crashed, lambda: run.latest_step > 0, "write a checkpoint")
    slurm_cluster.kill_rank(crashed, 1)
    assert run.wait(crashed).state == "FAILED"
    after_crash, before = run.latest_step, run.rows()
    assert after_crash % _CHECKPOINT_EVERY == 0

    # Canceled: it may finish its step and save.
    canceled = run.submit(line)
    run.wait_until(canceled, lambda: run.rows()[-1]["step"] > before[-1]["step"] + 2, "go on")
    slurm_cluster.cancel(canceled)
    assert run.wait(canceled).state == "CANCELLED"
    after_cancel = run.latest_step
    assert f"step {after_crash}," in run.log(canceled, node=0), (
        "the second job did not say where it goes on"
    )
    assert after_crash < after_cancel < _STEPS, "the job was canceled too late to prove anything"
    assert after_cancel == run.rows()[-1]["step"], (
        "it was asked to stop, but saved another step than its last"
    )

    last = run.submit(line)
    run.wait(last).check(run.folder / "logs")
    assert run.latest_step == _STEPS
    assert f"step {after_cancel}," in run.log(last, node=0)
    _check_rows(run.rows(), before, after_crash)
    _check_folder(run.folder, [crashed, canceled, last])

    judged = run.evaluate(data, tmp_path / "eval.json")
    run.wait(judged).check(run.folder / "logs")
    assert json.loads((tmp_path / "eval.json").read_text())


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A run folder and the cluster that trains in it."""

    cluster: SlurmCluster
    folder: Path
    env: dict[str, str]

    def submit(self, settings: list[str]) -> int:
        return self.cluster.submit(
            *("--nodes=2", "--cpus-per-task=2", f"--output={self.folder.parent}/batch-%j.log"),
            *("slurm/pretrain.sbatch", "tiny", str(self.folder), *_SETTINGS, *settings),
            env=self.env | {"VLMOE_PYTHON": sys.executable},
        )

    def evaluate(self, shards: str, results: Path) -> int:
        return self.cluster.submit(
            *(f"--output={self.folder.parent}/batch-%j.log", "slurm/evaluate.sbatch", self.folder),
            *("--shards", shards, "--json", results),
            env=self.env | {"VLMOE_PYTHON": sys.executable},
        )

    def wait(self, job_id: int) -> Job:
        return self.cluster.wait(
            job_id, timeout_seconds=_PATIENCE_SECONDS, logs=self.folder / "logs"
        )

    def wait_until(self, job_id: int, reached: Callable[[], bool], what: str) -> None:
        self.cluster.wait_until(
            job_id,
            lambda _: reached(),
            what=what,
            timeout_seconds=_PATIENCE_SECONDS,
            logs=self.folder / "logs",
        )

    @property
    def latest_step(self) -> int:
        """Step of the newest checkpoint, 0 when there is none."""
        latest = self.folder / "checkpoints" / "latest"
        return int(latest.read_text().strip().removeprefix("step-")) if latest.exists() else 0

    def rows(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl; a killed job may leave half a line."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def log(self, job_id: int, *, node: int) -> str:
        return (self.folder / "logs" / f"{job_id}-node{node}.log").read_text()


def _check_rows(rows: list[dict[str, Any]], before: list[dict[str, Any]], saved: int) -> None:
    """Every step stands there once, and those trained again after the crash gave the same
    losses."""
    assert [row["step"] for row in rows] == list(range(1, _STEPS + 1))
    loss_of = {row["step"]: row["loss/total"] for row in before}
    assert max(loss_of) >= saved, "the crash came before the checkpoint it should come after"
    assert {step: row["loss/total"] for row in rows if (step := row["step"]) in loss_of} == loss_of
    first, last = (sum(row["loss/total"] for row in part) / 10 for part in (rows[:10], rows[-10:]))
    assert last < 0.8 * first, f"hardly anything was learned: the loss went from {first} to {last}"


def _check_folder(folder: Path, jobs: list[int]) -> None:
    """Logs of both nodes, resolved settings, events and checkpoints are there, and no secret is."""
    logs = {file.name: file.read_text() for file in (folder / "logs").iterdir()}
    assert {f"{job}{node}.log" for job in jobs for node in ("", "-node0", "-node1")} <= logs.keys()
    assert {"config.yaml", "deepspeed.json", "tokenizer.model"} <= {
        file.name for file in folder.iterdir()
    }
    assert list((folder / "tensorboard").rglob("events.*"))
    final = folder / "checkpoints" / f"step-{_STEPS:08d}"
    assert len(list(final.glob("model-*.safetensors"))) == 2, (
        "with expert parallelism 2 both ranks hold experts"
    )
    assert len(list(final.glob("optimizer-*.safetensors"))) == 2
    assert "testsecret" not in "".join(logs.values()) + (folder / "config.yaml").read_text()
