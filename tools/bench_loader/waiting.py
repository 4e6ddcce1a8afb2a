"""Share of a training step that is spent waiting for data: a short real run of the smallest
preset."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.bench_loader.figures import Figure, Options, skipped
from tools.bench_loader.workloads import SMALL, VOCAB_SIZE, prepare
from tools.benchmark import Quartiles, note

WORKERS = 2
STEPS, WARM_UP_STEPS = 30, 6


def measure(options: Options) -> Iterator[Figure]:
    """`vlmoe train tiny` on one rank with two workers."""
    name = f"wait for data / step, preset tiny, {WORKERS} workers"
    if options.quick:
        yield skipped(name, "left out by --quick: it is a real training run")
        return
    data = prepare(SMALL, options.root)
    note(f"waiting: {STEPS} steps of training")
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
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={"OMP_NUM_THREADS": "1"} | os.environ,
    )
    if done.returncode:
        raise RuntimeError(f"training failed:\n{(done.stdout + done.stderr)[-2000:]}")
    yield from _figures(name, run)
    shutil.rmtree(run)


def _figures(name: str, run: Path) -> Iterator[Figure]:
    rows = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    steps = [row for row in rows if "data/wait_seconds" in row][WARM_UP_STEPS:]
    waits = [row["data/wait_seconds"] for row in steps]
    seconds = [row["perf/seconds_per_step"] for row in steps]
    share = 100 * sum(waits) / sum(seconds)
    shares = Quartiles.of([100 * wait / step for wait, step in zip(waits, seconds, strict=True)])
    yield Figure(
        name=name,
        value=shares._replace(median=share),
        unit="%",
        floor=3.0,
        goal=1.0,
        less_is_better=True,
        note=f"mean over {len(steps)} steps after {WARM_UP_STEPS}, quartiles of single steps; "
        f"a step takes {sum(seconds) / len(seconds):.2f} s on one thread",
    )
