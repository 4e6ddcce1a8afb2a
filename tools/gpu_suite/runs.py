"""Short real runs: the train command on synthetic shards, and what it says of its own speed and
memory."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tools.benchmark import Quartiles
from tools.figures import Figure, skipped
from tools.gpu_suite.options import Options
from tools.gpu_suite.results import Check, Report

WARM_UP_ROWS = 2
"""Rows of the journal that hold the start."""
START_SECONDS = 60.0
"""A run that has made no step after so long hangs; with less time nobody can tell."""
FIGURES = (
    ("samples a second", "perf/samples_per_second", "", 1.0),
    ("model FLOPs utilization", "perf/mfu", "%", 100.0),
    ("memory", "perf/memory_gib", "GiB", 1.0),
    ("waiting for data, seconds a step", "data/wait_seconds", "s", 1.0),
    ("seconds a step", "perf/seconds_per_step", "s", 1.0),
)


def tiny_run(options: Options, report: Report) -> None:
    """The smallest preset."""
    words = [
        "batch.global_batch_size=256",
        "batch.micro_batch_size=256",
        "schedule.total_steps=100",
    ]
    _run("tiny", words, options, report)


def s16_run(options: Options, report: Report) -> None:
    """The smallest preset that is worth a GPU."""
    words = ["batch.global_batch_size=512", "batch.micro_batch_size=512", "schedule.total_steps=40"]
    _run("s16", words, options, report)


SMALLER = [
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
"""On CPU: whether it runs at all."""


def _run(preset: str, words: list[str], options: Options, report: Report) -> None:
    from tools.bench_loader.workloads import SMALL, TEXT_LENGTH, VOCAB_SIZE, WEB, prepare

    workload = WEB if preset == "s16" else SMALL
    data = prepare(workload if options.on_gpu else SMALL.quick(), options.scratch / "data")
    engine = "deepspeed" if options.on_gpu and find_spec("deepspeed") else "plain"
    out = options.scratch / preset
    shutil.rmtree(out, ignore_errors=True)
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    settings = [
        f"data.train=[{data.folder}]",
        f"data.tokenizer={data.tokenizer}",
        f"model.vocab_size={VOCAB_SIZE}",
        f"model.context_length={TEXT_LENGTH}",
        f"parallel.engine={engine}",
        "schedule.warmup_steps=5",
        "log.captions_every_steps=0",
        "checkpoint.every_steps=0",
        "precision.compute=bf16",
        "log.every_steps=5",
        f"data.workers={workers}",
        *words,
        *([] if options.on_gpu else SMALLER),
    ]
    command = [sys.executable, "-m", "pretrain", "train", preset, "--out", str(out), *settings]
    environment = dict(os.environ)
    if not options.on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    seconds = max(5.0, options.left() - 3)
    time_was_up = False
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=seconds
        )
        ended, told = done.returncode == 0, (done.stdout + done.stderr).strip().splitlines()
        note = "" if ended else " / ".join(told[-3:])[-400:]
    except subprocess.TimeoutExpired:
        time_was_up, ended = True, False
        note = f"ended when its {seconds:.0f} s were up; figures are of the steps so far"
    rows = read_rows(out / "metrics.jsonl")
    losses = [row["loss/total"] for row in rows if "loss/total" in row]
    fine = bool(losses) and all(map(math.isfinite, losses))
    if time_was_up and not losses and seconds < START_SECONDS:
        report.add(
            skipped(f"{preset} trains", f"no step in the {seconds:.0f} s that were left for it")
        )
    else:
        report.add(
            Check(
                name=f"{preset} trains",
                passed=fine and (ended or time_was_up),
                note=note or f"engine {engine}",
                measured=f"loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else "no step",
                asked="finite losses",
            )
        )
    report.add(*run_figures(preset, rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a journal; none where there is no file."""
    if not path.exists():
        return []
    return [
        json.loads(line)
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.endswith("}")
    ]


def run_figures(preset: str, rows: list[dict[str, Any]]) -> list[Figure]:
    """What the run says of itself, the start left out."""
    counted = rows[WARM_UP_ROWS:]
    lines = []
    for name, key, unit, scale in FIGURES:
        values = [scale * row[key] for row in counted if key in row]
        if values:
            lines.append(Figure(name=f"{preset}: {name}", value=Quartiles.of(values), unit=unit))
        else:
            unknown = key == "perf/mfu" and counted
            why = "the peak of this device is not known" if unknown else "no steps after the start"
            lines.append(skipped(f"{preset}: {name}", why))
    return lines
