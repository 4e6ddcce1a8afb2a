"""Samples by number: a read of known length, its checksum, and the files in it.

The index says where a sample lies and where its files are, so nothing is scanned and no header is
parsed. Samples of shards on this machine are read one after the other; those of others by ranged
requests, many at once, so that a batch never waits for whole shards. What cannot be had or does not
have its checksum is a `SampleProblem` in the sample's place: the batch goes on without it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from zlib import crc32

from data_pipeline.common.errors import DataError
from data_pipeline.reading.open_shard import OpenShard, cut_up, damaged, problem
from data_pipeline.reading.remote import RemoteReader, Wanted
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import RawSample, SampleProblem

NO_KEY = "#"
"""Begins the name of a sample whose key cannot be known: `#7`."""

Found = RawSample | SampleProblem


class Reader:
    """Reads samples of a `ShardStore`; for one thread."""

    def __init__(self, store: ShardStore, *, max_sample_bytes: int = 0) -> None:
        """Read from `store`; samples of more than `max_sample_bytes` (0:
        `data.limits.sample_bytes`) are bad."""
        self._store = store
        self._max_bytes = max_sample_bytes or store.settings.limits.sample_bytes
        self._remote = RemoteReader(store)

    def name(self, shard: int, index: int) -> tuple[str, str]:
        """Shard name and key of a sample, for reports; `#INDEX` if the shard's index cannot be
        read."""
        try:
            return self._store.name(shard), self._store.open(shard).index.key(index)
        except DataError:
            return self._store.name(shard), f"{NO_KEY}{index}"

    def forget_troubles(self) -> None:
        """Ask stores again that did not answer or refused, instead of believing for a while that
        they still do."""
        self._store.forget_troubles()

    def read(self, shard: int, index: int) -> RawSample:
        """The files of one sample.

        Args:
            shard: Number of the shard in the store.
            index: Number of the sample in the shard.

        Raises:
            DataError: It cannot be had, or is damaged; the slug says how.
        """
        (found,) = self.read_many([(shard, index)])
        if isinstance(found, SampleProblem):
            raise DataError(found.detail, slug=found.reason)
        return found

    def read_many(self, refs: Sequence[tuple[int, int]]) -> list[Found]:
        """Some samples, in the order asked for.

        Remote ones come within `data.shard_seconds` all together, or are problems.

        Args:
            refs: Number of the shard in the store, and of the sample in the shard, of each.
        """
        end = time.monotonic() + self._store.settings.shard_seconds
        places: dict[int, list[int]] = {}
        for place, (shard, _) in enumerate(refs):
            places.setdefault(shard, []).append(place)
        found: list[Found | None] = [None] * len(refs)
        far: dict[int, OpenShard | None] = {}
        for shard, its_places in places.items():
            try:
                opened = self._store.at_hand(shard)
            except DataError as error:
                self._all_bad(shard, its_places, refs, error, found)
                continue
            if opened is None or opened.fd < 0:
                far[shard] = opened
            else:
                self._read_here(shard, opened, its_places, refs, found)
                if any(found[place] is None for place in its_places):
                    far[shard] = opened
        if far:
            self._read_far(far, places, refs, found, end)
        return [self._done(result, ref) for result, ref in zip(found, refs, strict=True)]

    def _read_here(
        self,
        number: int,
        shard: OpenShard,
        places: Sequence[int],
        refs: Sequence[tuple[int, int]],
        found: list[Found | None],
    ) -> None:
        """From a file; a sample of a copy that is damaged stays None, as the store may have it
        whole."""
        _, extents, checksums = shard.rows[:3]
        for place in places:
            i = refs[place][1]
            if extents[i] > self._max_bytes:
                found[place] = self._oversize(shard, i)
                continue
            try:
                data = shard.read(i)
            except OSError as error:
                # A network file system may have lost the file: for the next batch it is opened
                # anew.
                self._store.forget(number)
                text = f"cannot read shard {shard.name}: {error.strerror}; check the disk or the network file system"
                self._all_bad(number, places, refs, DataError(text, slug="unreachable"), found)
                return
            if crc32(data) == checksums[i]:
                found[place] = cut_up(shard, i, data)
            elif shard.is_copy:
                shard.damaged_copy = True
            else:
                found[place] = damaged(shard, i, data)

    def _read_far(
        self,
        far: dict[int, OpenShard | None],
        places: dict[int, list[int]],
        refs: Sequence[tuple[int, int]],
        found: list[Found | None],
        end: float,
    ) -> None:
        """From stores."""
        wanted: list[Wanted] = []
        for number, shard in self._remote.open(far, end):
            missing = [place for place in places[number] if found[place] is None]
            if isinstance(shard, DataError):
                self._all_bad(number, missing, refs, shard, found)
                continue
            if far[number] is None and shard.fd >= 0:  # there is a copy, as it turned out
                self._read_here(number, shard, missing, refs, found)
            for place in missing:
                i = refs[place][1]
                if found[place] is None and shard.rows[1][i] > self._max_bytes:
                    found[place] = self._oversize(shard, i)
                elif found[place] is None:
                    wanted.append(Wanted(place, shard, number, i))
        for one, result in self._remote.read(wanted, end):
            if isinstance(result, DataError):
                found[one.place] = problem(
                    one.shard, one.sample, result.slug or "unreachable", str(result)
                )
                continue
            found[one.place] = result
            if isinstance(result, RawSample) and one.shard.damaged_copy:
                one.shard.damaged_copy = False
                self._store.drop_copy(one.number)

    def _all_bad(
        self,
        number: int,
        places: Sequence[int],
        refs: Sequence[tuple[int, int]],
        error: DataError,
        found: list[Found | None],
    ) -> None:
        """The same trouble for all samples of a shard that are not there yet."""
        for place in places:
            if found[place] is None:
                key = f"{NO_KEY}{refs[place][1]}"
                found[place] = SampleProblem(
                    self._store.name(number), key, error.slug or "unreachable", str(error)
                )

    def _oversize(self, shard: OpenShard, i: int) -> SampleProblem:
        return problem(
            shard,
            i,
            "oversize",
            f"the sample has {shard.rows[1][i]} bytes, more than {self._max_bytes}",
        )

    def _done(self, found: Found | None, ref: tuple[int, int]) -> Found:
        assert found is not None, f"sample {ref} was forgotten"
        return found
