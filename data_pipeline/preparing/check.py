"""Verifies every sample of a dataset against its manifest.

One pass over each shard: its size and SHA-256 against the manifest, its index against the manifest,
each sample's CRC-32 against the index, and that it has one image; with `decode` also the image
and the captions are read. A shard can be corrupt although all its samples are intact, for example
if its end-of-archive marker is missing. The files of intact shards are counted a second time,
without the index (`second_count.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.common.processes import SINGLE_PART, Part
from data_pipeline.content.captions import all_captions, no_caption_error
from data_pipeline.content.image import decode_image
from data_pipeline.preparing.second_count import (
    FileCount,
    FolderCount,
    count_folder,
    count_members,
)
from data_pipeline.preparing.shard_access import (
    MAX_SAMPLE_BYTES,
    ShardUnavailableError,
    open_shard,
    read_file,
)
from data_pipeline.preparing.shard_map import ShardMap, UnavailableShard
from data_pipeline.preparing.tasks import ShardTask, shard_tasks
from data_pipeline.reading.open_shard import OpenShard
from data_pipeline.sample_keys import DEFAULT_KEYS, SampleKeys, image_bytes, image_problem
from data_pipeline.samples import RawSample
from data_pipeline.shards.manifest import Manifest

_CHUNK_BYTES = 8 << 20
_WHOLE_SHARD = -1
"""In place of a sample index: the finding concerns the shard as a whole."""


class Finding(NamedTuple):
    """A defect of a shard or a sample."""

    dataset: int
    """Index among the checked datasets."""
    shard: int
    """Index in its dataset; -1 for a shard that its manifest does not list."""
    sample: int
    """Index in its shard; -1 for the shard as a whole."""
    name: str
    """Name of the shard."""
    key: str
    reason: str
    """Short identifier, as in `DataError.slug`."""
    detail: str


class CheckReport(NamedTuple):
    """Result of a check."""

    samples: int
    shards: int
    findings: list[Finding]
    unavailable: list[UnavailableShard]
    """Shards that could not be read; their samples are also listed as findings."""
    files: FileCount
    """Files of all shards, counted without the index; its problems are among the findings."""
    not_counted: int
    """Shards whose files were not counted, because they are corrupt or were salvaged."""
    folders: list[FolderCount]
    """Files of the folders that the manifests do not list."""

    def counts_by_reason(self) -> list[tuple[str, int, int]]:
        """Reason, number of samples and number of shards, most frequent first."""
        samples = Counter(finding.reason for finding in self.findings if finding.sample >= 0)
        shards = Counter(finding.reason for finding in self.findings if finding.sample < 0)
        order = sorted(
            {*samples, *shards}, key=lambda reason: (-samples[reason], -shards[reason], reason)
        )
        return [(reason, samples[reason], shards[reason]) for reason in order]

    def corrupt_samples(self, dataset: int) -> dict[int, set[int]]:
        """Indices of the corrupt samples of a dataset, by shard index.

        Samples of unavailable shards are not included: they may be intact.
        """
        unavailable = {(row.task.dataset, row.task.shard) for row in self.unavailable}
        corrupt: dict[int, set[int]] = {}
        for finding in self.findings:
            if finding.dataset != dataset or finding.sample < 0:
                continue
            if (dataset, finding.shard) not in unavailable:
                corrupt.setdefault(finding.shard, set()).add(finding.sample)

        return corrupt


def check(
    manifests: Sequence[Manifest],
    *,
    decode: bool = False,
    count: bool = True,
    keys: SampleKeys = DEFAULT_KEYS,
    workers: int = 0,
    part: Part = SINGLE_PART,
    work_dir: str = "",
) -> CheckReport:
    """Check every sample and shard of the datasets; returns what is corrupt or unavailable.

    Args:
        manifests: The datasets.
        decode: Also decode images and read captions.
        count: Count the files of shards and folders a second time.
        keys: Where images and captions are.
        workers: Number of processes.
        part: Part of the shards to check; see `shard_tasks`.
        work_dir: Folder of stored results (see `ShardMap`); empty checks all shards again.
    """
    checker = _Checker(decode, count, keys)
    shard_map = ShardMap(
        label="checking", workers=workers, work_dir=work_dir, settings=repr(("check", 4, checker))
    )

    findings, unavailable, samples, shards = list[Finding](), list[UnavailableShard](), 0, 0
    files, not_counted = FileCount(), 0
    for task, result in shard_map.run(shard_tasks(manifests, part), checker):
        samples, shards = samples + task.num_samples, shards + 1
        if isinstance(result, UnavailableShard):
            unavailable.append(result)
            rows: list[_Row] = list(_all_samples(task, result.reason, result.detail))
            not_counted += 1
        else:
            content = json.loads(result)
            rows = content["rows"]
            files.in_samples += content["in_samples"]
            files.ignored.update(content["ignored"])
            not_counted += not content["counted"]

        for sample, key, reason, detail in rows:
            findings.append(
                Finding(task.dataset, task.shard, sample, task.entry.name, key, reason, detail)
            )

    folders = [count_folder(manifest) for manifest in manifests] if count else []
    for dataset, folder in enumerate(folders):
        detail = "its folder is that of the manifest, which does not list it; `vlmoe data index`"
        for name in folder.shards:
            findings.append(
                Finding(dataset, -1, _WHOLE_SHARD, name, "", "not-in-manifest", f"{detail} adds it")
            )
    return CheckReport(samples, shards, findings, unavailable, files, not_counted, folders)


def describe_location(finding: Finding) -> str:
    """Shard, sample index and key of a finding, for messages."""
    name = storage.redact(finding.name)
    return name if finding.sample < 0 else f"{name} #{finding.sample} {finding.key}"


_Row = tuple[int, str, str, str]
"""Sample index, key, reason, detail."""


def _all_samples(task: ShardTask, reason: str, detail: str) -> Iterator[_Row]:
    """Rows of an unreadable shard and each of its samples."""
    yield _WHOLE_SHARD, "", reason, detail
    yield from ((sample, f"#{sample}", reason, "") for sample in range(task.entry.samples))


@dataclass(frozen=True)
class _Checker:
    """Checks one shard; the result is JSON: a list of `_Row`, and the numbers of files."""

    decode: bool
    count: bool
    keys: SampleKeys

    def __call__(self, task: ShardTask) -> bytes:
        files = None
        try:
            with open_shard(task) as shard:
                rows = list(self._check_shard(shard))
                # In a corrupt shard, files are missing for a reason that is already a finding.
                is_whole = not task.entry.corruption and all(row[0] >= 0 for row in rows)
                if self.count and is_whole:
                    files = _count_files(shard)
                    rows += ((_WHOLE_SHARD, "", *problem) for problem in files.problems)
        except ShardUnavailableError:
            raise
        except DataError as error:
            rows = list(_all_samples(task, error.slug, str(error)))
        content = {
            "rows": rows,
            "counted": files is not None,
            "in_samples": files.in_samples if files else 0,
            "ignored": files.ignored if files else {},
        }
        return json.dumps(content).encode()

    def _check_shard(self, shard: OpenShard) -> Iterator[_Row]:
        index, sha256, position = shard.index, hashlib.sha256(), 0
        for sample in range(len(index)):
            offset, extent = int(index.offsets[sample]), int(index.extents[sample])
            for chunk in _chunks(shard, position, offset):
                sha256.update(chunk)

            crc, size, kept = 0, 0, list[bytes]()
            for chunk in _chunks(shard, offset, offset + extent):
                sha256.update(chunk)
                crc, size = zlib.crc32(chunk, crc), size + len(chunk)
                if self.decode and extent <= MAX_SAMPLE_BYTES:
                    kept.append(chunk)

            position = offset + extent
            defect = self._check_sample(shard, sample, size, crc, b"".join(kept))
            if defect:
                yield sample, index.key(sample), *defect

        for chunk in _chunks(shard, position, shard.file_bytes):
            sha256.update(chunk)
        yield from _compare_with_manifest(shard, sha256.hexdigest())

    def _check_sample(
        self, shard: OpenShard, sample: int, size: int, crc: int, extent: bytes
    ) -> tuple[str, str] | None:
        """Reason and detail if the sample is corrupt."""
        expected_size = int(shard.index.extents[sample])
        expected_crc = int(shard.index.crc32[sample])
        if size < expected_size:
            return "truncated", f"{size} of {expected_size} bytes"
        if crc != expected_crc:
            return "crc-mismatch", f"CRC-32 {crc:08x}, but the index has {expected_crc:08x}"
        members = shard.index.members(sample)
        if problem := image_problem((member.extension for member in members), self.keys.images):
            return problem
        if expected_size > MAX_SAMPLE_BYTES:
            return "oversize", f"{expected_size} bytes; the limit is {MAX_SAMPLE_BYTES}"
        if not self.decode:
            return None

        return self._check_content(shard.split(sample, extent))

    def _check_content(self, raw: RawSample) -> tuple[str, str] | None:
        try:
            decode_image(image_bytes(raw, self.keys.images))
            if not any(all_captions(raw.members, self.keys.captions)):
                raise no_caption_error(raw.members, self.keys.captions)
        except DataError as error:
            return error.slug or "invalid-text", str(error)
        return None


def _count_files(shard: OpenShard) -> FileCount:
    with open(os.dup(shard.fd), "rb") as file:
        file.seek(0)
        return count_members(file, shard.index)


def _compare_with_manifest(shard: OpenShard, sha256: str) -> Iterator[_Row]:
    entry = shard.entry
    if shard.file_bytes != entry.bytes:
        detail = f"{shard.file_bytes} bytes, but the manifest has {entry.bytes}"
        yield _WHOLE_SHARD, "", "length", detail
    elif sha256 != entry.sha256:
        detail = f"SHA-256 {sha256}, but the manifest has {entry.sha256}"
        yield _WHOLE_SHARD, "", "sha256", detail


def _chunks(shard: OpenShard, start: int, end: int) -> Iterator[bytes]:
    """The shard's bytes from `start` to `end`, fewer if the shard is truncated."""
    while start < end:
        chunk = read_file(shard, min(_CHUNK_BYTES, end - start), start)
        if not chunk:
            return
        yield chunk
        start += len(chunk)
