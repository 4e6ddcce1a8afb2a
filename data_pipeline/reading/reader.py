"""Reads samples by index: each in one read of known length, verified and split into files.

The index of a shard holds the offset of every sample and of its files, so shards are not scanned
and no tar headers are parsed. Samples of shards on this machine are read one after the other;
remote samples by concurrent ranged requests, so a batch never waits for whole shards. A sample that
is unavailable or fails its checksum is returned as a `SampleProblem` in its slot; the rest of the
batch is not affected.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_pipeline.common.errors import DataError
from data_pipeline.reading.open_shard import OpenShard
from data_pipeline.reading.remote import RemoteReader, SampleRequest
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import RawSample, SampleProblem

UNKNOWN_KEY_PREFIX = "#"
"""Prefix of the name of a sample whose key is unknown: `#7`."""

ReadResult = RawSample | SampleProblem


@dataclass
class _BatchRead:
    """The samples of one `read_many` call, and the results so far."""

    refs: Sequence[tuple[int, int]]
    """Shard and sample index of each sample."""
    results: list[ReadResult | None] = field(init=False)
    slots: dict[int, list[int]] = field(init=False)
    """Shard -> positions of its samples in `refs`."""

    def __post_init__(self) -> None:
        self.results = [None] * len(self.refs)
        self.slots = {}
        for slot, (shard, _) in enumerate(self.refs):
            self.slots.setdefault(shard, []).append(slot)

    def missing(self, shard: int) -> list[int]:
        """Slots of a shard's samples that have no result yet."""
        return [slot for slot in self.slots[shard] if self.results[slot] is None]

    def finished(self) -> list[ReadResult]:
        """All results."""
        results = []
        for result, ref in zip(self.results, self.refs, strict=True):
            assert result is not None, f"sample {ref} has no result"
            results.append(result)
        return results


class Reader:
    """Reads samples of a `ShardStore`; not thread-safe."""

    def __init__(self, store: ShardStore, *, max_sample_bytes: int = 0) -> None:
        """Read from `store`.

        Args:
            store: The shards.
            max_sample_bytes: Larger samples are problems; 0 means `data.limits.sample_bytes`.
        """
        self._store = store
        self._max_bytes = max_sample_bytes or store.settings.limits.sample_bytes
        self._remote = RemoteReader(store)

    def name(self, shard: int, index: int) -> tuple[str, str]:
        """Shard name and key of a sample, for reports; the key is `#INDEX` if the shard's index
        cannot be read."""
        try:
            return self._store.name(shard), self._store.open(shard).index.key(index)
        except DataError:
            return self._store.name(shard), f"{UNKNOWN_KEY_PREFIX}{index}"

    def clear_failures(self) -> None:
        """Discard records of stores that did not respond or refused access: try them again."""
        self._store.clear_failures()

    def read(self, shard: int, index: int) -> RawSample:
        """The files of one sample.

        Args:
            shard: Index of the shard in the store.
            index: Index of the sample in the shard.

        Raises:
            DataError: The sample is unavailable or corrupt; the slug is the reason.
        """
        (result,) = self.read_many([(shard, index)])
        if isinstance(result, SampleProblem):
            raise DataError(result.detail, slug=result.reason)
        return result

    def read_many(self, refs: Sequence[tuple[int, int]]) -> list[ReadResult]:
        """Read several samples, in the given order.

        Remote samples are read within `data.shard_seconds` in total; those that are not become
        problems.

        Args:
            refs: Index of the shard in the store and of the sample in the shard, for each sample.
        """
        deadline = time.monotonic() + self._store.settings.shard_seconds
        batch = _BatchRead(refs)
        remote: dict[int, OpenShard | None] = {}
        for shard, slots in batch.slots.items():
            try:
                opened = self._store.try_open(shard)
            except DataError as error:
                self._fail(batch, shard, error)
                continue

            if opened is None or opened.fd < 0:
                remote[shard] = opened
            else:
                self._read_file(batch, shard, opened, slots)
                if batch.missing(shard):
                    remote[shard] = opened

        if remote:
            self._read_remote(batch, remote, deadline)
        return batch.finished()

    def _read_file(
        self, batch: _BatchRead, shard_index: int, shard: OpenShard, slots: Sequence[int]
    ) -> None:
        """Read from a file.

        A corrupt sample of a cached copy gets no result, because the store may have it intact.
        """
        for slot in slots:
            i = batch.refs[slot][1]
            if problem := shard.oversize_problem(i, self._max_bytes):
                batch.results[slot] = problem
                continue

            try:
                data = shard.read(i)
            except OSError as error:
                # A network file system may have lost the file: open it again for the next batch.
                self._store.close_shard(shard_index)
                message = (
                    f"cannot read shard {shard.name}: {error.strerror}; "
                    f"check the disk or the network file system"
                )
                self._fail(batch, shard_index, DataError(message, slug="unreachable"))
                return

            result = shard.verify(i, data)
            if shard.is_copy and isinstance(result, SampleProblem):
                shard.copy_is_corrupt = True
            else:
                batch.results[slot] = result

    def _read_remote(
        self, batch: _BatchRead, shards: dict[int, OpenShard | None], deadline: float
    ) -> None:
        """Read all samples of `shards` that have no result yet from their stores."""
        requests: list[SampleRequest] = []
        for shard_index, shard in self._remote.open(shards, deadline):
            missing = batch.missing(shard_index)
            if isinstance(shard, DataError):
                self._fail(batch, shard_index, shard)
                continue

            if shards[shard_index] is None and shard.fd >= 0:  # there is a cached copy
                self._read_file(batch, shard_index, shard, missing)
            for slot in missing:
                i = batch.refs[slot][1]
                if batch.results[slot] is None:
                    batch.results[slot] = shard.oversize_problem(i, self._max_bytes)
                if batch.results[slot] is None:
                    requests.append(SampleRequest(slot, shard, shard_index, i))

        for request, result in self._remote.read(requests, deadline):
            if isinstance(result, DataError):
                reason = result.slug or "unreachable"
                batch.results[request.slot] = request.shard.problem(
                    request.sample, reason, str(result)
                )
                continue

            batch.results[request.slot] = result
            if isinstance(result, RawSample) and request.shard.copy_is_corrupt:
                request.shard.copy_is_corrupt = False
                self._store.remove_corrupt_copy(request.shard_index)

    def _fail(self, batch: _BatchRead, shard: int, error: DataError) -> None:
        """Report an error of a shard for all of its samples that have no result yet."""
        name, reason = self._store.name(shard), error.slug or "unreachable"
        for slot in batch.missing(shard):
            key = f"{UNKNOWN_KEY_PREFIX}{batch.refs[slot][1]}"
            batch.results[slot] = SampleProblem(name, key, reason, str(error))
