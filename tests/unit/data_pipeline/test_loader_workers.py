"""Worker processes of the loader: their buffers, how they end, and the signals that they
ignore."""

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
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading import batch_stream, collate
from data_pipeline.loading.collate import BatchBuilder, PackedBatch
from tests.support.loaders import NUM_SAMPLES, LoaderFactory, take_steps
from tests.support.small_shards import make_data_config, make_shards


def pack_empty_batch() -> PackedBatch:
    return BatchBuilder(2, image_size=4, context_length=8, pad_id=0).packed([])


def test_buffer_pool_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collate, "get_worker_info", lambda: "a worker")
    monkeypatch.setattr(collate, "_pool", [])
    addresses = set()
    for _ in range(50):
        packed = pack_empty_batch()
        addresses.add(packed.buffer.data_ptr())
        assert packed.is_pooled

        batch = packed.unpack()
        view = batch.text_ids  # a reference to any tensor keeps the buffer in use
        del batch
        assert all(buffer[-8:].view(torch.int64)[0] for buffer in collate._pool)
        del view
    assert len(addresses) == len(collate._pool) == 1

    size = len(collate._pool[0])
    monkeypatch.setattr(collate, "MAX_POOL_BYTES", 10 * size + 1)
    batches = [pack_empty_batch() for _ in range(15)]
    assert len({packed.buffer.data_ptr() for packed in batches}) == len(batches)
    assert [packed.is_pooled for packed in batches].count(False) == 5


def test_worker_that_dies(factory: LoaderFactory) -> None:
    with closing(factory.open(data=make_data_config(workers=1, prefetch=1))) as loader:
        steps = loader.steps()
        next(steps)
        (worker,) = (child for child in multiprocessing.active_children() if child.is_alive())
        assert worker.pid
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(DataError, match="worker died"):
            for _ in range(5):
                next(steps)


def test_read_that_never_returns(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error after the timeout, and the worker can be terminated."""
    manifest = make_shards(tmp_path, count=NUM_SAMPLES)
    index = tmp_path / manifest.shards[2].index
    index.unlink()
    os.mkfifo(index)  # opening it blocks until there is a writer, like a file of a dead server
    monkeypatch.setattr(batch_stream, "POLL_SECONDS", 1)
    loader = LoaderFactory(manifest, tokenizer).open(
        data=make_data_config(workers=1, shard_seconds=1, timeout_seconds=2)
    )
    with pytest.raises(DataError, match=r"no batch within 2 s .*data\.timeout_seconds"):
        take_steps(loader, 8)

    # Python terminates its children at exit, and then waits for them.
    for worker in multiprocessing.active_children():
        worker.terminate()
        worker.join(timeout=10)
        assert not worker.is_alive()


def test_workers_end_with_the_loader(factory: LoaderFactory) -> None:
    loader = factory.open(data=make_data_config(workers=2))
    next(loader.steps())
    workers = multiprocessing.active_children()
    assert len(workers) >= 2
    loader.close()
    assert not [worker for worker in workers if worker.is_alive()]


TRAINER = """
import multiprocessing, signal, subprocess, sys
from multiprocessing.context import ForkServerProcess
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_spec import BatchSpec
from data_pipeline.loading.loader import Loader
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.order.state import LoaderState
from tests.support.small_shards import make_data_config

class SignaledAtStart(ForkServerProcess):
    def start(self):
        super().start()
        # Sent by another process: workers ignore signals unless the trainer sends them.
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            subprocess.run(["kill", f"-{name.value}", str(self.pid)])

if __name__ == "__main__":
    multiprocessing.get_context("forkserver").Process = SignaledAtStart
    loader = Loader(
        sources=[load_manifest(sys.argv[1])],
        tokenizer=Tokenizer.load(sys.argv[2]),
        data=make_data_config(workers=2),
        batch=BatchSpec(image_size=8, context_length=16, micro_batch_size=8),
        global_batch_size=8,
        seed=0,
        state=LoaderState(),
    )
    next(loader.steps())
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    sys.stdin.read()
"""


def test_workers_ignore_signals_and_end_with_a_killed_trainer(
    factory: LoaderFactory, tokenizer_path: str, tmp_path: Path
) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    trainer = subprocess.Popen(
        [sys.executable, str(script), factory.manifest.url, tokenizer_path],
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
