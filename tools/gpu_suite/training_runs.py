"""Short training runs on synthetic shards, and the speed and memory that they log."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

from pretrain.train.jsonl import METRICS_FILE, read_log
from pretrain.train.log_entry import LogEntry
from tools.gpu_suite.options import Options
from tools.gpu_suite.results import Check, Report
from tools.measurements import Measurement, not_measured
from tools.timing import Quartiles

WARMUP_ROWS = 2
"""First rows of metrics.jsonl, excluded from measurements."""
STARTUP_SECONDS = 60.0
"""A run that logs no step in this time fails; with less time left, it is only not measured."""


class LoggedMetric(NamedTuple):
    """A metric of metrics.jsonl that is reported."""

    label: str
    value: Callable[[LogEntry], float | None]
    """None if the run does not log it."""
    unit: str
    scale: float


METRICS = (
    LoggedMetric("samples per second", lambda row: row.throughput.samples_per_second, "", 1.0),
    LoggedMetric("model FLOPs utilization", lambda row: row.throughput.mfu, "%", 100.0),
    LoggedMetric("memory", lambda row: row.throughput.memory_gib, "GiB", 1.0),
    LoggedMetric("data wait per step", lambda row: row.data.wait_seconds, "s", 1.0),
    LoggedMetric("seconds per step", lambda row: row.throughput.seconds_per_step, "s", 1.0),
)
CPU_SETTINGS = [
    "model.width=32",
    "model.num_heads=2",
    "model.num_layers=2",
    "model.fusion_layer=1",
    "model.ffn_width=32",
    "model.embed_dim=16",
    "model.pool_heads=2",
    "model.image_size=32",
    "model.patch_size=16",
    "moe.expert_width=16",
    "moe.num_experts=4",
    "batch.global_batch_size=8",
    "batch.micro_batch_size=8",
    "schedule.total_steps=6",
    "data.workers=0",
    "precision.compute=fp32",
    "log.every_steps=1",
]
"""Minimal sizes for a CPU, to test that training runs."""


def tiny_run(options: Options, report: Report) -> None:
    """Train the preset `tiny`."""
    settings = [
        "batch.global_batch_size=256",
        "batch.micro_batch_size=256",
        "schedule.total_steps=100",
    ]
    _run("tiny", settings, options, report)


def s16_run(options: Options, report: Report) -> None:
    """Train the preset `s16`."""
    settings = [
        "batch.global_batch_size=512",
        "batch.micro_batch_size=512",
        "schedule.total_steps=40",
    ]
    _run("s16", settings, options, report)


class Outcome(NamedTuple):
    """How a training process ended."""

    completed: bool
    """Exit status 0."""
    timed_out: bool
    note: str


def _run(preset: str, settings: list[str], options: Options, report: Report) -> None:
    """Train a preset until it ends or time is up; report the losses and the logged metrics."""
    engine = "deepspeed" if options.on_gpu and find_spec("deepspeed") else "plain"
    out = options.scratch / preset
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "pretrain", "train", preset, "--out", str(out)]
    command += _settings(preset, engine, options) + settings
    if not options.on_gpu:
        command += CPU_SETTINGS

    seconds = max(5.0, options.seconds_left() - 3)
    outcome = _train(command, seconds, on_gpu=options.on_gpu)
    rows = read_log(out / METRICS_FILE)
    losses = [row.losses.total for row in rows]
    if outcome.timed_out and not losses and seconds < STARTUP_SECONDS:
        report.add(not_measured(f"{preset} trains", f"no step in the remaining {seconds:.0f} s"))
    else:
        finite = bool(losses) and all(map(math.isfinite, losses))
        report.add(
            Check(
                name=f"{preset} trains",
                passed=finite and (outcome.completed or outcome.timed_out),
                note=outcome.note or f"engine {engine}",
                measured=f"loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else "no step",
                expected="finite losses",
            )
        )
    report.add(*run_measurements(preset, rows))


def _settings(preset: str, engine: str, options: Options) -> list[str]:
    """Settings of a run on synthetic shards, which are written if missing."""
    from tools.bench_loader.workloads import CONTEXT_LENGTH, SMALL, VOCAB_SIZE, WEB, prepare

    workload = WEB if preset == "s16" else SMALL
    data = prepare(workload if options.on_gpu else SMALL.quick(), options.scratch / "data")
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    return [
        f"data.train=[{data.folder}]",
        f"data.tokenizer={data.tokenizer}",
        f"model.vocab_size={VOCAB_SIZE}",
        f"model.context_length={CONTEXT_LENGTH}",
        f"parallel.engine={engine}",
        "schedule.warmup_steps=5",
        "log.captions_every_steps=0",
        "checkpoint.every_steps=0",
        "precision.compute=bf16",
        "log.every_steps=5",
        f"data.workers={workers}",
    ]


def _train(command: list[str], seconds: float, *, on_gpu: bool) -> Outcome:
    environment = dict(os.environ)
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        note = f"stopped after {seconds:.0f} s; measurements are of the steps until then"
        return Outcome(completed=False, timed_out=True, note=note)
    if done.returncode == 0:
        return Outcome(completed=True, timed_out=False, note="")
    lines = (done.stdout + done.stderr).strip().splitlines()
    return Outcome(completed=False, timed_out=False, note=" / ".join(lines[-3:])[-400:])


def run_measurements(preset: str, rows: Sequence[LogEntry]) -> list[Measurement]:
    """Quartiles of the logged metrics after the warm-up."""
    rows = rows[WARMUP_ROWS:]
    measurements = []
    for label, value_of, unit, scale in METRICS:
        name = f"{preset}: {label}"
        values = [scale * value for row in rows if (value := value_of(row)) is not None]
        if values:
            measurements.append(Measurement(name=name, value=Quartiles.of(values), unit=unit))
        elif rows:  # only the utilization may be missing
            measurements.append(not_measured(name, "the peak FLOP/s of this device is unknown"))
        else:
            measurements.append(not_measured(name, "no steps after the warm-up"))
    return measurements
