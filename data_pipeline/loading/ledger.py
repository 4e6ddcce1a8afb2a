"""Ledger: a record of the samples of every step, to verify that none was lost over all restarts.

A folder contains `ledger.json`, the inputs of the order (`ledger_metadata.py`), and one append-only
file per rank, `rank-00003.ledger`:

    file    8 bytes  b"VLMLEDG1"
    then one record per step, all integers little-endian:
            4 bytes  b"STEP"
            4        CRC-32 of everything after this field to the end of the record
            8        step, 1 for the first
            8, 8     position in the order before and after the step
            4, 4     world size, micro-batch size
            4        number of samples n
            8 x n    samples, micro-batch after micro-batch: the sample's index over all shards of
                     all sources, plus 2**62 if it was corrupt, plus 2**61 if a filter excluded it

A record is written by one system call, before its step counts as done. An incomplete record after
a crash does not match its CRC and is removed at the next start, as are the records of steps after
the checkpoint that training resumes from: those steps are repeated.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.loading.ledger_metadata import LedgerMetadata
from data_pipeline.samples import Batch

CORRUPT, FILTERED = 1 << 62, 1 << 61
"""Flags in a recorded sample."""

_MAGIC = b"VLMLEDG1"
_STEP = b"STEP"
_RECORD = struct.Struct("<4sI")
_FIELDS = struct.Struct("<QQQIII")
_MAX_SAMPLES = 1 << 28


class Record(NamedTuple):
    """The samples of one rank in one step."""

    step: int
    before: int
    """Position before the step; its samples are at `before .. after - 1`, except skipped ones."""
    after: int
    world_size: int
    micro_batch_size: int
    samples: np.ndarray
    """int64, in the order of the micro-batches, with flags; see the module docstring."""

    @property
    def ids(self) -> np.ndarray:
        """Sample indices without flags."""
        return self.samples & (FILTERED - 1)


class Ledger:
    """The ledger file of one rank, open for appending."""

    def __init__(
        self, fd: int, path: Path, *, world_size: int, micro_batch_size: int, last_step: int
    ) -> None:
        self._fd, self._path = fd, path
        self._world_size, self._micro_batch_size = world_size, micro_batch_size
        self._last_step = last_step

    @staticmethod
    def open(
        folder: str | os.PathLike[str],
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        resumed_step: int,
        metadata: LedgerMetadata | None = None,
    ) -> Ledger:
        """Open this rank's file, and remove records of steps after `resumed_step`.

        Rank 0 also truncates the files of ranks that do not exist any more, and writes `metadata`.

        Args:
            folder: The ledger of the run; created if missing.
            rank: This rank.
            world_size: Number of ranks.
            micro_batch_size: Pairs per micro-batch.
            resumed_step: Steps done in the checkpoint that training resumes from; 0 at the start.
            metadata: Inputs of the order; required on rank 0.

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
                        os.close(_open_truncated(other_path, resumed_step))
            fd = _open_truncated(path, resumed_step)
        except OSError as error:
            raise StorageError(
                f"cannot write the ledger {path}: {error.strerror}; free disk space or fix the "
                f"permissions, or set data.ledger=false"
            ) from error

        if rank == 0 and metadata is not None:
            metadata.write(base)
        return Ledger(
            fd,
            path,
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            last_step=resumed_step,
        )

    def add(self, step: int, before: int, after: int, batches: Sequence[Batch]) -> None:
        """Record one step, before it counts as done.

        Args:
            step: The step, 1 for the first.
            before: Position of the loader state before it.
            after: Position after it.
            batches: This rank's micro-batches.

        Raises:
            StorageError: The disk is full.
        """
        assert step == self._last_step + 1, f"ledger: step {step} follows step {self._last_step}"
        samples = np.concatenate([_flagged_samples(batch) for batch in batches])
        fields = _FIELDS.pack(
            step, before, after, self._world_size, self._micro_batch_size, len(samples)
        )
        body = fields + samples.astype("<i8", copy=False).tobytes()
        record = _RECORD.pack(_STEP, zlib.crc32(body)) + body

        try:
            written = os.write(self._fd, record)
        except OSError as error:
            raise StorageError(
                f"cannot write the ledger {self._path}: {error.strerror}; free disk space, or set "
                f"data.ledger=false"
            ) from error
        if written < len(record):
            raise StorageError(
                f"the disk is full: wrote {written} of {len(record)} bytes to {self._path}"
            )
        self._last_step = step

    def truncate_after(self, step: int, metadata: LedgerMetadata | None = None) -> None:
        """Remove the records of all steps after `step`, from which training resumes; see `open` for
        `metadata`."""
        self.close()
        self._fd, self._last_step = _open_truncated(self._path, step), step
        if metadata is not None:
            metadata.write(self._path.parent)

    def sync(self) -> None:
        """Flush all records to disk; call it before a checkpoint is written."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def rank_file(rank: int) -> str:
    """File name of a rank."""
    return f"rank-{rank:05d}.ledger"


def rank_files(folder: Path) -> dict[int, Path]:
    """Rank -> file, for all files of a ledger."""
    files = {}
    for path in sorted(folder.glob("rank-*.ledger")):
        rank = path.name.removeprefix("rank-").removesuffix(".ledger")
        if rank.isdigit():
            files[int(rank)] = path
    return files


def read_records(path: Path) -> Iterator[Record]:
    """Every complete record of one rank, in order; an incomplete one at the end is ignored.

    Raises:
        DataError: The file is not a ledger, or there are records after a corrupt one.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        magic = file.read(len(_MAGIC))
        if magic != _MAGIC[: len(magic)]:
            raise DataError(f"{path} is not a ledger: it begins with {magic!r}")

        while True:
            start = file.tell()
            record = _read_record(file.read)
            if record is None:
                file.seek(min(start + 1, size))
                if _STEP in file.read():
                    raise DataError(
                        f"{path} is corrupt at byte {start}: there are more records after an "
                        f"incomplete one"
                    )
                return
            yield record


def _read_record(read: Callable[[int], bytes]) -> Record | None:
    """The next record of a file; None at its end or if the record is incomplete."""
    header = read(_RECORD.size + _FIELDS.size)
    if len(header) < _RECORD.size + _FIELDS.size:
        return None

    magic, crc = _RECORD.unpack_from(header)
    step, before, after, world_size, micro_batch_size, count = _FIELDS.unpack_from(
        header, _RECORD.size
    )
    if magic != _STEP or count > _MAX_SAMPLES:
        return None

    data = read(8 * count)
    if zlib.crc32(data, zlib.crc32(header[_RECORD.size :])) != crc or len(data) < 8 * count:
        return None
    samples = np.frombuffer(data, dtype="<i8")
    return Record(step, before, after, world_size, micro_batch_size, samples)


def _open_truncated(path: Path, last_step: int) -> int:
    """Open a file for appending, after removing incomplete records and those after `last_step`."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with open(fd, "rb", closefd=False) as file:
            magic = file.read(len(_MAGIC))
            end = len(_MAGIC)
            if magic == _MAGIC:
                while (record := _read_record(file.read)) is not None and record.step <= last_step:
                    end = file.tell()
            elif magic != _MAGIC[: len(magic)]:
                raise StorageError(
                    f"{path} is not a ledger: it begins with {magic!r}; move it elsewhere"
                )

        if len(magic) < len(_MAGIC):
            os.pwrite(fd, _MAGIC, 0)
        os.ftruncate(fd, end)
        os.lseek(fd, end, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _flagged_samples(batch: Batch) -> np.ndarray:
    """All samples of a micro-batch: the delivered ones in order, then the others with flags."""
    not_delivered = [
        problem.id | (FILTERED if problem.is_filtered else CORRUPT) for problem in batch.problems
    ]
    return np.concatenate([batch.ids.numpy(), np.array(not_delivered, dtype=np.int64)])
