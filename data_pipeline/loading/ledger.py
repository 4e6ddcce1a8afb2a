"""Which samples every step got: a record that proves, after any number of restarts, that none was
lost.

A folder holds `ledger.json`, what the order was made of (`ledger_facts.py`), and one file a rank,
`rank-00003.ledger`, that only grows:

    file    8 bytes  b"VLMLEDG1"
    then a record a step, all numbers little-endian:
            4 bytes  b"STEP"
            4        CRC-32 of everything after this field to the record's end
            8        number of the step, 1 for the first
            8, 8     position in the order before and after the step
            4, 4     ranks, pairs of a micro-batch
            4        number of samples n
            8 x n    samples, micro-batch after micro-batch: the sample's number over all shards of all
                     sources, plus 2**62 if it was bad, plus 2**61 if a filter left it out

A record is handed to the system in one piece before its step counts. What a crash leaves of a
half-written one does not have its CRC and is taken back at the next start, as is all about steps
after the checkpoint that training goes on from: those steps are done again.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.loading.ledger_facts import LedgerFacts
from data_pipeline.samples import Batch

BAD, FILTERED = 1 << 62, 1 << 61
"""Marks on a sample's number."""

_FILE_HEAD = b"VLMLEDG1"
_STEP = b"STEP"
_RECORD = struct.Struct("<4sI")
_FIELDS = struct.Struct("<QQQIII")


class Record(NamedTuple):
    """What one rank got in one step."""

    step: int
    before: int
    """Position before the step; its samples lie in `before .. after - 1`, less what is skipped."""
    after: int
    world_size: int
    micro_batch_size: int
    samples: np.ndarray
    """int64, in the order of the micro-batches; marked, see the module's text."""

    @property
    def ids(self) -> np.ndarray:
        """The samples' numbers without marks."""
        return self.samples & (FILTERED - 1)


class Ledger:
    """One rank's record, open for more."""

    def __init__(
        self, fd: int, path: Path, *, world_size: int, micro_batch_size: int, last_step: int
    ) -> None:
        self._fd, self._path = fd, path
        self._world, self._pairs = world_size, micro_batch_size
        self._last = last_step

    @staticmethod
    def open(
        folder: str | os.PathLike[str],
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        resumed_step: int,
        facts: LedgerFacts | None = None,
    ) -> Ledger:
        """Open this rank's file, and take back what it says of steps after `resumed_step`.

        Rank 0 does so too for the files of ranks that are no more, and writes `facts`.

        Args:
            folder: Of the run's ledger; made if missing.
            rank: This rank.
            world_size: Ranks.
            micro_batch_size: Pairs of a micro-batch.
            resumed_step: Steps done in the checkpoint that training goes on from, 0 at the start.
            facts: What the order is made of; needed from rank 0.

        Raises:
            StorageError: The folder cannot be written.
        """
        base = Path(folder)
        path = base / rank_file(rank)
        try:
            base.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                for other, other_path in rank_files(base).items():
                    if other >= world_size:
                        os.close(_open_trimmed(other_path, resumed_step))
            fd = _open_trimmed(path, resumed_step)
        except OSError as error:
            raise StorageError(
                f"cannot write the ledger {path}: {error.strerror}; free space or mend "
                f"permissions there, or set data.ledger=false"
            ) from error
        if rank == 0 and facts is not None:
            facts.write(base)
        return Ledger(
            fd,
            path,
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            last_step=resumed_step,
        )

    def add(self, step: int, before: int, after: int, batches: Sequence[Batch]) -> None:
        """Record one step, before it counts.

        Args:
            step: Its number, 1 for the first.
            before: Position of the loader's state before it.
            after: Position after it.
            batches: This rank's micro-batches.

        Raises:
            StorageError: The disk is full.
        """
        assert step == self._last + 1, f"step {step} follows step {self._last} in the ledger"
        samples = np.concatenate([_marked(batch) for batch in batches])
        fields = _FIELDS.pack(step, before, after, self._world, self._pairs, len(samples))
        body = fields + samples.astype("<i8", copy=False).tobytes()
        record = _RECORD.pack(_STEP, zlib.crc32(body)) + body
        try:
            written = os.write(self._fd, record)
        except OSError as error:
            raise StorageError(
                f"cannot write the ledger {self._path}: {error.strerror}; free space there, or set "
                f"data.ledger=false"
            ) from error
        if written < len(record):
            raise StorageError(
                f"the disk is full: {self._path} took {written} of {len(record)} bytes"
            )
        self._last = step

    def take_back(self, step: int, facts: LedgerFacts | None = None) -> None:
        """Forget all steps after `step`, which training goes on from again; see `open` for
        `facts`."""
        self.close()
        self._fd, self._last = _open_trimmed(self._path, step), step
        if facts is not None:
            facts.write(self._path.parent)

    def sync(self) -> None:
        """Make all records survive a crash of the machine; call it before a checkpoint is
        written."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def rank_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}.ledger"


def rank_files(folder: Path) -> dict[int, Path]:
    """All ranks' files in a ledger's folder."""
    found = {}
    for path in sorted(folder.glob("rank-*.ledger")):
        number = path.name.removeprefix("rank-").removesuffix(".ledger")
        if number.isdigit():
            found[int(number)] = path
    return found


def read_records(path: Path) -> Iterator[Record]:
    """Every whole record of one rank, in order; a half-written one at the end is left out.

    Raises:
        DataError: The file is not a ledger, or there are more records after a damaged one.
    """
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        head = file.read(len(_FILE_HEAD))
        if head != _FILE_HEAD[: len(head)]:
            raise DataError(f"{path} is not a ledger: it begins with {head!r}")
        while True:
            start = file.tell()
            record = _next(file.read)
            if record is None:
                file.seek(min(start + 1, total))
                if _STEP in file.read():
                    raise DataError(
                        f"{path} is damaged at byte {start}: it has more records after one that is not whole"
                    )
                return
            yield record


def _next(read: Any) -> Record | None:
    """The next record of a file; None at its end, or where there is no whole one."""
    head = read(_RECORD.size + _FIELDS.size)
    if len(head) < _RECORD.size + _FIELDS.size:
        return None
    magic, crc = _RECORD.unpack_from(head)
    step, before, after, world_size, pairs, count = _FIELDS.unpack_from(head, _RECORD.size)
    if magic != _STEP or count > 1 << 28:
        return None
    data = read(8 * count)
    if zlib.crc32(data, zlib.crc32(head[_RECORD.size :])) != crc or len(data) < 8 * count:
        return None
    return Record(step, before, after, world_size, pairs, np.frombuffer(data, dtype="<i8"))


def _open_trimmed(path: Path, last_step: int) -> int:
    """A file ready for records after `last_step`; what it has of later steps, and half records, are
    gone."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with open(fd, "rb", closefd=False) as file:
            head = file.read(len(_FILE_HEAD))
            end = len(_FILE_HEAD)
            if head == _FILE_HEAD:
                while (record := _next(file.read)) is not None and record.step <= last_step:
                    end = file.tell()
            elif head != _FILE_HEAD[: len(head)]:
                raise StorageError(f"{path} is not a ledger: it begins with {head!r}; move it away")
        if len(head) < len(_FILE_HEAD):
            os.pwrite(fd, _FILE_HEAD, 0)
        os.ftruncate(fd, end)
        os.lseek(fd, end, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _marked(batch: Batch) -> np.ndarray:
    """All samples of a micro-batch: the delivered ones in order, then the others with their
    marks."""
    left_out = [
        problem.id | (FILTERED if problem.is_filtered else BAD) for problem in batch.problems
    ]
    return np.concatenate([batch.ids.numpy(), np.array(left_out, dtype=np.int64)])
