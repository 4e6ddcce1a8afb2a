"""Iterates over batches by index, built in this process or in worker processes.

A batch is a pure function of its index, so workers can build batches in any order, and torch's
DataLoader returns them in the right one. Workers are started by a fork server: a fork of the
training process would inherit threads (object stores, CUDA) that do not run in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from data_pipeline.common.errors import DataError
from data_pipeline.loading.collate import PackedBatch
from data_pipeline.loading.pipeline import BatchPipeline
from data_pipeline.loading.worker_process import WorkerError, fork_server, prepare_worker
from data_pipeline.samples import Batch

POLL_SECONDS = 5
"""Interval at which a waiting trainer checks that its workers are alive."""


class BatchStream:
    """Batches in the order of `indices`, prefetched by `workers` processes (0: built on demand)."""

    def __init__(
        self,
        pipeline: BatchPipeline,
        indices: Iterable[int],
        *,
        workers: int,
        prefetch: int,
        timeout_seconds: float,
    ) -> None:
        self._timeout, self._pipeline = timeout_seconds, pipeline
        worker_options: dict[str, Any] = {}
        if workers:
            # The server imports torch and this package once, so its children start fast.
            worker_options = {
                "multiprocessing_context": fork_server(preload=__name__),
                "worker_init_fn": prepare_worker,
                "prefetch_factor": prefetch,
                "timeout": POLL_SECONDS,
            }

        loader = DataLoader(
            pipeline,
            batch_size=None,
            sampler=_IndexSampler(indices),
            num_workers=workers,
            collate_fn=_identity,
            # A separate generator: DataLoader samples a seed, and must not use the global one.
            generator=torch.Generator(),
            **worker_options,
        )
        self._batches: Iterator[PackedBatch | WorkerError] | None = iter(loader)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        result = self._wait()
        if isinstance(result, WorkerError):
            self.close()
            raise result.error()
        return result.unpack()

    def close(self) -> None:
        """Stop the worker processes, and close what was opened in this process."""
        self._batches = None  # torch stops the workers when the iterator is freed
        self._pipeline.close()

    def _wait(self) -> PackedBatch | WorkerError:
        if self._batches is None:
            raise StopIteration

        start = time.monotonic()
        while True:
            try:
                return next(self._batches)
            except RuntimeError as error:
                message = str(error)
                if message.startswith("DataLoader worker (pid"):
                    raise self._worker_died(message) from None

                # `next` may be called again after a timeout: the DataLoader keeps its state. Short
                # timeouts are needed because torch checks for dead workers only between them.
                if not message.startswith(f"DataLoader timed out after {POLL_SECONDS} seconds"):
                    raise
                if time.monotonic() - start > self._timeout:
                    self.close()
                    raise DataError(
                        f"no batch within {self._timeout:g} s (data.timeout_seconds): the disk or "
                        f"store with the shards does not respond, or is too slow"
                    ) from None
            except (EOFError, ConnectionError, FileNotFoundError) as error:
                if str(error).startswith("Caught "):
                    raise  # raised by code in a worker, with its traceback
                # A worker that dies while it sends a batch leaves a broken connection.
                reason = f"broken connection: {type(error).__name__}"
                raise self._worker_died(reason) from None

    def _worker_died(self, reason: str) -> DataError:
        self.close()
        return DataError(
            f"a data loader worker died ({reason}); it may have run out of memory or of space in "
            f"/dev/shm: reduce data.workers or data.prefetch"
        )


class _IndexSampler(Sampler[int]):
    def __init__(self, indices: Iterable[int]) -> None:
        self._indices = indices

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)


def _identity(batch: Any) -> Any:
    return batch
