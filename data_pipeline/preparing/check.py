"""Looks at every sample of a dataset: is it what the manifest says, and can it be used?

One pass over each shard: its length and SHA-256 against the manifest, its index against the
manifest, every sample's CRC-32 against the index; with `contents` also the picture and the
captions. A shard can be bad where no sample is (its end mark was cut off), and the other way round
never.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.common.processes import WHOLE, Part
from data_pipeline.content.images import decode
from data_pipeline.content.recipe import picture_of
from data_pipeline.preparing.captions import all_captions
from data_pipeline.preparing.visit import (
    MAX_SAMPLE_BYTES,
    OpenShard,
    ShardTask,
    Unread,
    UnreadError,
    Visits,
    opened,
    tasks_of,
)
from data_pipeline.samples import RawSample
from data_pipeline.shards.manifest import Manifest

_PIECE_BYTES = 8 << 20


class Finding(NamedTuple):
    """Something that is wrong."""

    dataset: int
    """Number among the datasets that were checked."""
    shard: int
    """Number in its dataset."""
    sample: int
    """Number in its shard; -1 where the shard as a whole is meant."""
    name: str
    """The shard's."""
    key: str
    reason: str
    """One word by which it is counted."""
    detail: str


class Checked(NamedTuple):
    """What a check found."""

    samples: int
    shards: int
    findings: list[Finding]
    unread: list[Unread]
    """Shards that could not be had; their samples are findings, too."""

    def reasons(self) -> list[tuple[str, int, int]]:
        """Reason, samples and whole shards, most frequent first."""
        samples = Counter(found.reason for found in self.findings if found.sample >= 0)
        shards = Counter(found.reason for found in self.findings if found.sample < 0)
        order = sorted(
            {*samples, *shards}, key=lambda reason: (-samples[reason], -shards[reason], reason)
        )
        return [(reason, samples[reason], shards[reason]) for reason in order]

    def bad(self, dataset: int) -> dict[int, set[int]]:
        """Numbers of samples that are proven bad, by number of their shard, of one dataset."""
        unread = {(row.task.dataset, row.task.shard) for row in self.unread}
        bad: dict[int, set[int]] = {}
        for found in self.findings:
            if (
                found.dataset == dataset
                and found.sample >= 0
                and (dataset, found.shard) not in unread
            ):
                bad.setdefault(found.shard, set()).add(found.sample)
        return bad


def check(
    manifests: Sequence[Manifest],
    *,
    contents: bool = False,
    caption_keys: Sequence[str] = ("txt",),
    workers: int = 0,
    part: Part = WHOLE,
    work: str = "",
) -> Checked:
    """Check datasets.

    Args:
        manifests: The datasets.
        contents: Decode pictures and read captions too.
        caption_keys: Where a caption must be, if `contents`: under one of them.
        workers: Processes.
        part: Share of the shards to check.
        work: Where results are kept; empty checks all anew.
    """
    checker = _Checker(contents, tuple(caption_keys))
    visits = Visits(
        label="checking", workers=workers, work=work, settings=repr(("check", 2, checker))
    )
    findings, unread, samples, shards = list[Finding](), list[Unread](), 0, 0
    for task, result in visits.each(tasks_of(manifests, part), checker):
        samples, shards = samples + task.num_samples, shards + 1
        if isinstance(result, Unread):
            unread.append(result)
            rows: list[_Row] = list(_all_of(task, result.reason, result.detail))
        else:
            rows = json.loads(result)
        for number, key, reason, detail in rows:
            findings.append(
                Finding(task.dataset, task.shard, number, task.entry.name, key, reason, detail)
            )
    return Checked(samples, shards, findings, unread)


_Row = tuple[int, str, str, str]
"""Number, key, reason, detail."""


def _all_of(task: ShardTask, reason: str, detail: str) -> Iterator[_Row]:
    """A shard of which nothing can be read, and each of its samples."""
    yield -1, "", reason, detail
    yield from ((number, f"#{number}", reason, "") for number in range(task.entry.samples))


@dataclass(frozen=True)
class _Checker:
    """Checks one shard; its result is JSON rows `[number, key, reason, detail]`."""

    contents: bool
    caption_keys: tuple[str, ...]

    def __call__(self, task: ShardTask) -> bytes:
        return json.dumps(list(self._rows(task))).encode()

    def _rows(self, task: ShardTask) -> Iterator[_Row]:
        try:
            with opened(task) as shard:
                yield from self._shard(shard)
        except UnreadError:
            raise
        except DataError as error:
            yield from _all_of(task, error.slug, str(error))

    def _shard(self, shard: OpenShard) -> Iterator[_Row]:
        entry, index, sha256, position = shard.task.entry, shard.index, hashlib.sha256(), 0
        for number in range(len(index)):
            offset, extent = int(index.offsets[number]), int(index.extents[number])
            for piece in _pieces(shard, position, offset):
                sha256.update(piece)
            crc, pieces, found = 0, list[bytes](), 0
            for piece in _pieces(shard, offset, offset + extent):
                sha256.update(piece)
                crc, found = zlib.crc32(piece, crc), found + len(piece)
                if self.contents and extent <= MAX_SAMPLE_BYTES:
                    pieces.append(piece)
            position = offset + extent
            problem = self._sample(shard, number, found, crc, b"".join(pieces))
            if problem:
                yield number, index.key(number), *problem
        for piece in _pieces(shard, position, shard.size):
            sha256.update(piece)
        if shard.size != entry.bytes:
            yield (
                -1,
                "",
                "length",
                f"it has {shard.size} bytes, but its manifest expects {entry.bytes}",
            )
        elif sha256.hexdigest() != entry.sha256:
            yield (
                -1,
                "",
                "sha256",
                f"its SHA-256 is {sha256.hexdigest()}, but its manifest expects {entry.sha256}",
            )

    def _sample(
        self, shard: OpenShard, number: int, found: int, crc: int, extent: bytes
    ) -> tuple[str, str] | None:
        """Reason and detail if a sample is bad."""
        expected_bytes, expected = int(shard.index.extents[number]), int(shard.index.crc32[number])
        if found < expected_bytes:
            return "truncated", f"{found} of {expected_bytes} bytes"
        if crc != expected:
            return "crc-mismatch", f"CRC-32 {crc:08x}, but the index expects {expected:08x}"
        if expected_bytes > MAX_SAMPLE_BYTES:
            return "oversize", f"{expected_bytes} bytes, more than {MAX_SAMPLE_BYTES}"
        if not self.contents:
            return None
        members = {
            m.extension: extent[m.start : m.start + m.size] for m in shard.index.members(number)
        }
        return self._contents(RawSample(shard.task.entry.name, shard.index.key(number), members))

    def _contents(self, raw: RawSample) -> tuple[str, str] | None:
        try:
            decode(picture_of(raw))
            if not any(all_captions(raw, self.caption_keys)):
                return (
                    "no-caption",
                    f"none under {', '.join(self.caption_keys)}; it has {', '.join(raw.members)}",
                )
        except DataError as error:
            return error.slug or "bad-text", str(error)
        return None


def _pieces(shard: OpenShard, start: int, end: int) -> Iterator[bytes]:
    """The shard's bytes from `start` to `end`, fewer where it ends before."""
    while start < end:
        piece = shard.pread(min(_PIECE_BYTES, end - start), start)
        if not piece:
            return
        yield piece
        start += len(piece)


def where_of(found: Finding) -> str:
    """A finding's place in words."""
    name = storage.redact(found.name)
    return name if found.sample < 0 else f"{name} #{found.sample} {found.key}"
