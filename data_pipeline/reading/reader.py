"""Reads samples by index: each in one read of known length, verified and split into files.

The index of a shard holds the offset of every sample and of its files, so shards are not scanned
and no tar headers are parsed. Samples of shards on this machine are read one after the other;
remote samples by concurrent ranged requests, so a batch never waits for whole shards. For a sample
that is unavailable or fails its checksum, a `SampleProblem` is returned; the rest of the batch is
not affected.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_pipeline.common.errors import DataError
from data_pipeline.reading.open_shard import OpenShard
from data_pipeline.reading.remote import RemoteReader
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import RawSample, SampleProblem, SampleRef

UNKNOWN_KEY_PREFIX = "#"
"""Prefix of the name of a sample whose key is unknown: `#7`."""


@dataclass
class _BatchRead:
    """The samples of one `read_many` call, and the results so far."""

    refs: Sequence[SampleRef]
    results: dict[SampleRef, RawSample | SampleProblem] = field(default_factory=dict)
    by_shard: dict[int, list[SampleRef]] = field(init=False)

    def __post_init__(self) -> None:
        self.by_shard = {}
        for ref in dict.fromkeys(self.refs):
            self.by_shard.setdefault(ref.shard, []).append(ref)

    def missing(self, shard: int) -> list[SampleRef]:
        """A shard's samples that have no result yet."""
        return [ref for ref in self.by_shard[shard] if ref not in self.results]


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

    def clear_failures(self) -> None:
        """Discard records of stores that did not respond or refused access: try them again."""
        self._store.clear_failures()

    def read_many(self, refs: Sequence[SampleRef]) -> list[RawSample | SampleProblem]:
        """Read several samples, in the given order.

        Remote samples are read within `data.shard_seconds` in total; those that are not become
        problems.
        """
        deadline = time.monotonic() + self._store.settings.shard_seconds
        batch = _BatchRead(refs)
        remote: dict[int, OpenShard | None] = {}
        for shard_index, shard_refs in batch.by_shard.items():
            try:
                shard = self._store.try_open(shard_index)
            except DataError as error:
                self._fail(batch, shard_index, error)
                continue

            if shard is None or shard.fd < 0:
                remote[shard_index] = shard
            else:
                if not self._read_file(batch, shard_index, shard, shard_refs):
                    remote[shard_index] = shard

        if remote:
            self._read_remote(batch, remote, deadline)
        return [batch.results[ref] for ref in refs]

    def _read_file(
        self, batch: _BatchRead, shard_index: int, shard: OpenShard, refs: Sequence[SampleRef]
    ) -> bool:
        """Read from a file.

        A corrupt sample of a cached copy gets no result, because the store may have it intact.

        Returns:
            Whether every sample has a result.
        """
        has_results = True
        for ref in refs:
            if problem := shard.oversize_problem(ref.sample, self._max_bytes):
                batch.results[ref] = problem
                continue

            try:
                data = shard.read(ref.sample)
            except OSError as error:
                # A network file system may have lost the file: open it again for the next batch.
                self._store.close_shard(shard_index)
                message = (
                    f"cannot read shard {shard.name}: {error.strerror}; "
                    f"check the disk or the network file system"
                )
                self._fail(batch, shard_index, DataError(message, slug="unreachable"))
                return True

            result = shard.verify(ref.sample, data)
            if shard.is_copy and isinstance(result, SampleProblem):
                shard.copy_is_corrupt, has_results = True, False
            else:
                batch.results[ref] = result
        return has_results

    def _read_remote(
        self, batch: _BatchRead, shards: dict[int, OpenShard | None], deadline: float
    ) -> None:
        """Read all samples of `shards` that have no result yet from their stores."""
        refs: list[SampleRef] = []
        opened: dict[int, OpenShard] = {}
        for shard_index, shard in self._remote.open(shards, deadline):
            if isinstance(shard, DataError):
                self._fail(batch, shard_index, shard)
                continue

            opened[shard_index] = shard
            if shards[shard_index] is None and shard.fd >= 0:  # there is a cached copy
                self._read_file(batch, shard_index, shard, batch.missing(shard_index))
            for ref in batch.missing(shard_index):
                if problem := shard.oversize_problem(ref.sample, self._max_bytes):
                    batch.results[ref] = problem
                else:
                    refs.append(ref)

        for ref, result in self._remote.read(refs, opened, deadline):
            batch.results[ref] = result
            shard = opened[ref.shard]
            if isinstance(result, RawSample) and shard.copy_is_corrupt:
                shard.copy_is_corrupt = False
                self._store.remove_corrupt_copy(ref.shard)

    def _fail(self, batch: _BatchRead, shard_index: int, error: DataError) -> None:
        """Report an error of a shard for all of its samples that have no result yet."""
        name, reason = self._store.name(shard_index), error.slug or "unreachable"
        for ref in batch.missing(shard_index):
            key = f"{UNKNOWN_KEY_PREFIX}{ref.sample}"
            batch.results[ref] = SampleProblem(name, key, reason, str(error))
