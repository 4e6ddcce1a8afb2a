"""Saving in the background: training continues, and the checkpoint has the state of its start."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import CheckpointError, find_latest, load_latest
from pretrain.checkpoint import writer as writer_module
from pretrain.checkpoint.writer import CheckpointWriter
from tests.unit.pretrain.checkpoint_support import FakeEngine, FakeWorld, one_rank


class SlowDisk:
    """Writing waits until `allow` is set, and then fails if there is an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allow = threading.Event()
        self.error: OSError | None = None
        real = writer_module.write_tensors

        def write(path: Path, tensors: Any) -> Any:
            assert self.allow.wait(20)
            if self.error:
                raise self.error
            return real(path, tensors)

        monkeypatch.setattr(writer_module, "write_tensors", write)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    slow = SlowDisk(monkeypatch)
    yield slow
    slow.allow.set()


def loaded(root: Path) -> tuple[str, float, float]:
    """Name and values of the latest checkpoint."""
    engine = one_rank()
    resumed = load_latest(engine, root)
    assert resumed is not None
    return resumed.path.name, float(engine.dense[0, 0]), float(engine.moments["exp_avg"][0])


def test_training_continues_with_other_values(tmp_path: Path, disk: SlowDisk) -> None:
    engine = one_rank(value=1.0)
    writer = CheckpointWriter(engine, tmp_path)
    writer.start(1, {})
    assert writer.is_pending and not writer.is_ready() and find_latest(tmp_path) is None
    engine.dense += 5.0  # the next step, in place
    engine.moments["exp_avg"] += 5.0
    disk.allow.set()
    assert writer.finish() == tmp_path / "step-00000001" and not writer.is_pending
    assert loaded(tmp_path) == ("step-00000001", 1.0, 1.0)

    buffers = {name: tensor.data_ptr() for name, tensor in writer._buffers.items()}
    writer.start(2, {})
    writer.finish()
    assert loaded(tmp_path) == ("step-00000002", 6.0, 6.0)
    assert {name: tensor.data_ptr() for name, tensor in writer._buffers.items()} == buffers


def test_the_next_checkpoint_waits_for_the_previous_one(tmp_path: Path, disk: SlowDisk) -> None:
    engine = one_rank(value=1.0)
    writer = CheckpointWriter(engine, tmp_path)
    writer.start(1, {})
    timer = threading.Timer(0.3, disk.allow.set)
    timer.start()
    engine.dense += 1.0
    writer.start(2, {}, in_background=False)
    assert find_latest(tmp_path) == tmp_path / "step-00000001"
    writer.finish()
    assert loaded(tmp_path) == ("step-00000002", 2.0, 1.0)


def test_the_last_checkpoint_is_complete(tmp_path: Path, disk: SlowDisk) -> None:
    writer = CheckpointWriter(one_rank(value=1.0), tmp_path)
    writer.start(1, {})
    disk.allow.set()
    writer.start(2, {}, in_background=False)
    writer.finish()
    assert loaded(tmp_path)[0] == "step-00000002"
    assert (tmp_path / "step-00000001").exists()


def test_ranks_advance_together(tmp_path: Path, disk: SlowDisk) -> None:
    """As in the training loop: a rank advances once all are ready."""
    world = FakeWorld(2)
    writers = [CheckpointWriter(FakeEngine(world, rank, value=2.0), tmp_path) for rank in range(2)]
    world.run(lambda rank: writers[rank].start(3, {}))
    disk.allow.set()
    phases = 0
    while writers[0].is_pending:
        while not all(writer.is_ready() for writer in writers):
            pass
        assert world.run(lambda rank: writers[rank].advance()) == [None, None]
        phases += 1
    assert phases == 2 and not writers[1].is_pending
    assert find_latest(tmp_path) == tmp_path / "step-00000003"


def test_an_error_in_the_background_is_raised_on_every_rank(tmp_path: Path, disk: SlowDisk) -> None:
    world = FakeWorld(2)
    writers = [CheckpointWriter(FakeEngine(world, rank), tmp_path) for rank in range(2)]
    world.run(lambda rank: writers[rank].start(3, {}))
    disk.error = OSError(28, "No space left on device")
    disk.allow.set()
    errors = world.run(lambda rank: writers[rank].finish())
    assert [type(error) for error in errors] == [CheckpointError] * 2
    assert "No space left" in str(errors[0])
    assert list(tmp_path.iterdir()) == []
    disk.error = None
    world.run(lambda rank: writers[rank].start(4, {}))
    assert world.run(lambda rank: writers[rank].finish()) == [tmp_path / "step-00000004"] * 2
