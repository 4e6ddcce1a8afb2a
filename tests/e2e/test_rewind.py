"""A run that does not recover goes back to its last checkpoint and leaves out the bad data."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.order.state import LoaderState
from data_pipeline.samples import Batch
from pretrain.config.presets import load_run
from pretrain.config.schema import RunConfig
from pretrain.model.vision_language import ModelOutput
from pretrain.parallel.errors import TrainingError
from pretrain.parallel.plain_engine import PlainEngine
from pretrain.train import loop
from pretrain.train.build import build
from pretrain.train.jsonl import read_rows
from pretrain.train.state import TrainState
from tests.e2e.test_training_data import SETTINGS, check_ledger
from tests.support.shape_dataset import ShapeDataset, make_shape_dataset

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

STEPS, BATCH = 12, 8


class PoisonedEngine(PlainEngine):
    """An engine whose loss is not finite for some samples."""

    poisoned: Collection[int] = ()

    def forward(self, batch: Batch, **options: Any) -> ModelOutput:
        output = super().forward(batch, **options)
        if not set(batch.ids.tolist()) & set(self.poisoned):
            return output
        return output._replace(caption_loss_sum=output.caption_loss_sum * math.nan)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ShapeDataset:
    folder = tmp_path_factory.mktemp("shapes")
    return make_shape_dataset(folder, pairs=2 * STEPS * BATCH, samples_per_shard=32)


def run_config(shapes: ShapeDataset, *overrides: str) -> RunConfig:
    settings = [*SETTINGS, *shapes.overrides, f"schedule.total_steps={STEPS}"]
    settings += ["parallel.engine=plain", "data.ledger=true", "checkpoint.every_steps=3"]
    return load_run("tiny", [*settings, "guard.max_skipped_steps=2", *overrides])


def train(
    run: RunConfig, out: Path, monkeypatch: pytest.MonkeyPatch, poisoned: Collection[int]
) -> tuple[TrainState, dict[str, torch.Tensor]]:
    """The final state and weights of a run with these poisoned samples."""
    monkeypatch.setattr(PoisonedEngine, "poisoned", poisoned)
    monkeypatch.setattr("pretrain.train.build.PlainEngine", PoisonedEngine)
    components = build(run, out)
    state = loop.train(components)
    return state, components.engine.master_weights()


def samples_at(run: RunConfig, out: Path, positions: range) -> list[int]:
    """The samples at positions of the run's order."""
    components = build(run, out)
    loader = components.open_loader(LoaderState(seed=run.seed))
    refs = loader.order.samples(positions.start, len(positions))
    loader.close()
    starts = [0]
    for shard in components.sources[0].manifest.shards:
        starts.append(starts[-1] + shard.samples)
    return [starts[ref.shard] + ref.sample for ref in refs]


def test_bad_data_is_left_out(
    shapes: ShapeDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Steps 6 and 7 (positions 40 to 56) are bad, two checkpoints exist; step 10 is bad alone.
    run = run_config(shapes)
    bad = samples_at(run, tmp_path / "order", range(41, 49))
    alone = samples_at(run, tmp_path / "order", range(90, 91))
    with caplog.at_level(logging.WARNING):
        state, weights = train(run, tmp_path / "run", monkeypatch, [*bad, *alone])
    assert state.step == STEPS and state.loader.skip == ((40, 56),)
    assert state.loader.position == STEPS * BATCH + 16
    assert "2 steps in a row did not update the weights: the run goes back to" in caplog.text

    # The same as a run that leaves out these positions from the start.
    real = loop._resume
    monkeypatch.setattr(
        loop,
        "_resume",
        lambda components: (
            TrainState(loader=LoaderState(seed=run.seed).with_skipped(40, 56))
            if real(components).step == 0
            else real(components)
        ),
    )
    expected, expected_weights = train(run, tmp_path / "expected", monkeypatch, alone)
    assert expected.loader == state.loader
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)

    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("run", "expected")]
    losses = [[(row["step"], row["loss/total"]) for row in run_rows] for run_rows in rows]
    assert losses[0][:9] == losses[1][:9] and [step for step, _ in losses[0]] == list(range(1, 13))
    assert check_ledger(tmp_path / "run").returncode == 0

    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    events = [(row["event"], row["step"]) for row in map(json.loads, lines)]
    assert events == [
        ("start", 0),
        ("skipped-step", 6),
        ("skipped-step", 7),
        ("rewind", 3),
        ("skipped-step", 10),
    ]


def test_a_run_that_never_recovers_ends(
    shapes: ShapeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_config(shapes, "guard.max_rewinds=1")
    everything = range(10_000)
    components = build(run, tmp_path / "locked")
    other = (
        "import sys, pathlib; from pretrain.train.run_lock import lock_run_folder\n"
        "lock_run_folder(pathlib.Path(sys.argv[1]), wait_seconds=0)"
    )
    started = [sys.executable, "-c", other, str(tmp_path / "locked")]
    assert b"is in use by process" in subprocess.run(started, stderr=subprocess.PIPE).stderr
    assert components.lock is not None
    with pytest.raises(TrainingError, match="there is no checkpoint to go back to"):
        train(run, tmp_path / "start", monkeypatch, everything)
    later = samples_at(run, tmp_path / "order", range(40, 192))
    with pytest.raises(TrainingError, match=r"already went back .* 1 time \(guard\.max_rewinds\)"):
        train(run, tmp_path / "later", monkeypatch, later)
    # The last checkpoint is from before the first bad step, and is still there.
    steps = sorted(path.name for path in (tmp_path / "later" / "checkpoints").glob("step-*"))
    assert steps == ["step-00000003"]
