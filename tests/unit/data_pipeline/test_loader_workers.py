"""The processes that make batches: their memory, their end, and the signals that they do not
hear."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from data_pipeline.common.errors import DataError
from data_pipeline.loading import collate, feed
from data_pipeline.loading.collate import BatchRows
from tests.support.loaders import COUNT, Setup, take
from tests.support.small_shards import make_shards, settings


def test_a_worker_keeps_few_pieces_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collate, "get_worker_info", lambda: "a worker")
    monkeypatch.setattr(collate, "_kept", [])
    places = set()
    for _ in range(50):
        packed = BatchRows(2, image_size=4, context_length=8, pad_id=0).packed([])
        places.add(packed.memory.data_ptr())
        assert packed.is_lent
        batch = packed.unpack()
        view = batch.text_ids  # whatever is held of it holds all
        del batch
        assert all(kept[-8:].view(torch.int64)[0] for kept in collate._kept)
        del view
    assert len(places) == len(collate._kept) == 1
    size = len(collate._kept[0])
    monkeypatch.setattr(collate, "MOST_KEPT_BYTES", 10 * size + 1)
    lent = [BatchRows(2, image_size=4, context_length=8, pad_id=0).packed([]) for _ in range(15)]
    assert len({packed.memory.data_ptr() for packed in lent}) == len(lent)
    assert [packed.is_lent for packed in lent].count(False) == 5


def test_a_worker_that_dies_is_a_clear_error(setup: Setup) -> None:
    with closing(setup.open(data=settings(workers=1, prefetch=1))) as loader:
        steps = loader.steps()
        next(steps)
        (worker,) = (child for child in multiprocessing.active_children() if child.is_alive())
        assert worker.pid
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(DataError, match="a loader process ended unexpectedly"):
            for _ in range(5):
                next(steps)


def test_a_read_that_never_returns_is_a_clear_error_and_can_be_left(
    tmp_path: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_shards(tmp_path, count=COUNT)
    index = tmp_path / manifest.shards[2].index
    index.unlink()
    os.mkfifo(index)  # opening it waits for a writer, as opening a file of a dead server does
    monkeypatch.setattr(feed, "POLL_SECONDS", 1)
    loader = Setup(manifest, tokenizer_path).open(
        data=settings(workers=1, shard_seconds=1, timeout_seconds=2)
    )
    with pytest.raises(DataError, match=r"no batch came within 2 s .*does not answer"):
        take(loader, 8)
    # What Python does to its children when it exits; then it waits for them.
    for worker in multiprocessing.active_children():
        worker.terminate()
        worker.join(timeout=10)
        assert not worker.is_alive()


def test_workers_end_with_the_loader(setup: Setup) -> None:
    loader = setup.open(data=settings(workers=2))
    next(loader.steps())
    workers = multiprocessing.active_children()
    assert len(workers) >= 2
    loader.close()
    assert not [worker for worker in workers if worker.is_alive()]


TRAINER = """
import multiprocessing, signal, subprocess, sys
from multiprocessing.context import ForkServerProcess
from data_pipeline.loading.loader import Loader
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.order.state import LoaderState
from tests.support.small_shards import settings

class SignalledAtBirth(ForkServerProcess):
    def start(self):
        super().start()
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            subprocess.run(["kill", f"-{name.value}", str(self.pid)])  # workers listen to the trainer itself

if __name__ == "__main__":
    multiprocessing.get_context("forkserver").Process = SignalledAtBirth
    loader = Loader(
        manifests=[load_manifest(sys.argv[1])], tokenizer_path=sys.argv[2], data=settings(workers=2), image_size=8,
        context_length=16, seed=0, rank=0, world_size=1, global_batch_size=8, micro_batch_size=8, state=LoaderState(),
    )
    next(loader.steps())
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    sys.stdin.read()
"""


def test_workers_ignore_signals_but_end_with_a_killed_trainer(setup: Setup, tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    trainer = subprocess.Popen(
        [sys.executable, str(script), setup.manifest.url, setup.tokenizer],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    try:
        assert trainer.stdout
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(workers) == 2
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(workers[0], name)
        time.sleep(0.3)
        assert all(os.path.exists(f"/proc/{pid}") for pid in workers)
    finally:
        trainer.kill()
        trainer.communicate()
    deadline = time.monotonic() + 15
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}")]
