"""Fraction of a training step spent waiting for data, in a short run of the smallest preset."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from pretrain.train.jsonl import METRICS_FILE, read_log
from tools.bench_loader.options import Options
from tools.bench_loader.workloads import SMALL, VOCAB_SIZE, prepare
from tools.measurements import Measurement, not_measured
from tools.reporting import log_progress
from tools.timing import Quartiles

WORKERS = 2
STEPS, WARMUP_STEPS = 30, 6


def measure(options: Options) -> Iterator[Measurement]:
    """Run `vlmoe train tiny` on one rank with two workers."""
    name = f"wait for data / step, preset tiny, {WORKERS} workers"
    if options.quick:
        yield not_measured(name, "skipped with --quick: it is a training run")
        return

    data = prepare(SMALL, options.root)
    log_progress(f"waiting: {STEPS} steps of training")
    run = options.root / "run"
    shutil.rmtree(run, ignore_errors=True)
    settings = [
        f"data.train=[{data.folder}]",
        f"data.tokenizer={data.tokenizer}",
        f"model.vocab_size={VOCAB_SIZE}",
        f"data.workers={WORKERS}",
        f"schedule.total_steps={STEPS}",
        "schedule.warmup_steps=5",
        "batch.global_batch_size=128",
        "log.every_steps=1",
        "log.captions_every_steps=0",
        "checkpoint.every_steps=0",
    ]
    command = [sys.executable, "-m", "pretrain", "train", "tiny", "--out", str(run), *settings]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"training failed:\n{(done.stdout + done.stderr)[-2000:]}")
    yield _wait_fraction(name, run)
    shutil.rmtree(run)


def _wait_fraction(name: str, run: Path) -> Measurement:
    entries = read_log(run / METRICS_FILE)[WARMUP_STEPS:]
    waits = [entry.data.wait_seconds for entry in entries]
    seconds = [entry.throughput.seconds_per_step for entry in entries]
    percent = 100 * sum(waits) / sum(seconds)
    by_step = Quartiles.of([100 * wait / step for wait, step in zip(waits, seconds, strict=True)])
    return Measurement(
        name=name,
        value=by_step._replace(median=percent),
        unit="%",
        floor=3.0,
        goal=1.0,
        less_is_better=True,
        note=f"mean over {len(entries)} steps after {WARMUP_STEPS}, quartiles of single steps; "
        f"a step takes {sum(seconds) / len(seconds):.2f} s on one thread",
    )
