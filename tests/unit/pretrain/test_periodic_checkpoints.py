"""When a run saves checkpoints by time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.order.state import LoaderState
from pretrain.checkpoint import find_latest, read_meta
from pretrain.config.schema import CheckpointConfig
from pretrain.train import periodic_checkpoints
from pretrain.train.periodic_checkpoints import PeriodicCheckpoints
from pretrain.train.state import TrainState
from tests.unit.pretrain.checkpoint_support import one_rank


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [1000.0]
    monkeypatch.setattr(periodic_checkpoints, "time", SimpleNamespace(monotonic=lambda: time[0]))
    return time


def checkpoints(root: Path, **config: Any) -> PeriodicCheckpoints:
    components: Any = SimpleNamespace(
        run=SimpleNamespace(checkpoint=CheckpointConfig(**config)),
        engine=one_rank(),
        checkpoints=root,
        tokenizer=SimpleNamespace(fingerprint="t"),
    )
    return PeriodicCheckpoints(components, None)


def test_every_minutes(tmp_path: Path, now: list[float]) -> None:
    saves = checkpoints(tmp_path, every_minutes=2.0)
    now[0] += 119.0
    assert not saves.is_due()
    now[0] += 1.0
    assert saves.is_due()
    saves.save(TrainState(step=7, loader=LoaderState()), last=False)
    assert not saves.is_due()
    now[0] += 120.0
    assert saves.is_due()
    saves.save(TrainState(step=9, loader=LoaderState(position=72)), last=True)
    path = find_latest(tmp_path)
    assert path == tmp_path / "step-00000009" and not saves.writer.is_pending
    state = read_meta(path).state
    assert state["tokenizer"] == "t" and state["train"]["loader"]["position"] == 72


def test_0_disables_it(tmp_path: Path, now: list[float]) -> None:
    saves = checkpoints(tmp_path)
    now[0] += 1e9
    assert not saves.is_due()
