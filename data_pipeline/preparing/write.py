"""Writes the rows of a source as shards: balanced, reproducible and resumable.

The source is read twice: once to count its rows, so that shard sizes differ by at most one, and
once to assign rows to shards. A shard's bytes depend only on its records. The tasks of a job array
can each write a part of the shards; a call without `part` completes the work and writes the
manifest and `skipped.jsonl`, the list of all rows that did not become a sample. If too many are
skipped, the list of those found until then is written before the error, into `.parts` if the
folder has a finished dataset.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.logs import Progress
from data_pipeline.common.processes import SINGLE_PART, Part, map_in_processes
from data_pipeline.common.tables import counted, join_counts
from data_pipeline.preparing.importers.records import (
    Ignored,
    Importer,
    Record,
    SkippedRow,
    UniqueKeys,
)
from data_pipeline.preparing.resumable_shards import ShardPlan, ShardWriter
from data_pipeline.preparing.skipped_list import too_many_skipped, write_skipped
from data_pipeline.shards.manifest import (
    INPUTS_FIELD,
    MANIFEST_NAME,
    SKIPPED_FIELD,
    SKIPPED_NAME,
    Manifest,
    ShardEntry,
    write_manifest,
)

logger = logging.getLogger(__name__)

SOURCE_FIELD = "source_fingerprint"
"""Field of the manifest with the fingerprint of the source."""


@dataclass(frozen=True, kw_only=True)
class WritePlan:
    """What to write, and how."""

    source: Importer
    out: str
    """Folder of the shards; local or in an object store."""
    prefix: str = "shard"
    samples_per_shard: int = 1000
    """Maximum number of samples per shard; shard sizes differ by at most one."""
    max_skipped_ratio: float = 0.01
    """Maximum ratio of rows that may be skipped, 0..1."""
    decode: bool = False
    """Decode every image and skip corrupt ones."""
    overwrite: bool = False
    """Replace a dataset in the folder that was written from another source."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ConfigError(f"--samples-per-shard {self.samples_per_shard}: must be at least 1")
        if not 0 <= self.max_skipped_ratio <= 1:
            raise ConfigError(f"--max-skipped-ratio {self.max_skipped_ratio}: must be in 0..1")


class WriteResult(NamedTuple):
    """Summary of a call."""

    manifest: Manifest | None
    """None if only a part of the shards was written."""
    samples: int
    bytes: int
    shards: int
    reused: int
    """Number of shards that were already written."""
    skipped: list[SkippedRow]
    inputs: Inputs


class Inputs(NamedTuple):
    """How many inputs of the source (lines, files, rows) ended where; together, all of them."""

    unit: str
    in_samples: int
    skipped: int
    ignored: dict[str, int]
    """By rule."""

    def describe(self) -> str:
        """One line: all counts, and their sum."""
        ignored = join_counts(self.ignored)
        num_ignored = sum(self.ignored.values())
        return (
            f"{self.in_samples + self.skipped + num_ignored:,} {self.unit}: "
            f"{self.in_samples:,} in samples, {self.skipped:,} skipped, {num_ignored:,} ignored"
            + (f" ({ignored})" if ignored else "")
        )


def write_dataset(
    plan: WritePlan,
    *,
    workers: int = 0,
    part: Part = SINGLE_PART,
    about: Mapping[str, Any] | None = None,
) -> WriteResult:
    """Write a source as shards.

    Args:
        plan: What to write.
        workers: Number of processes.
        part: Part of the shards to write.
        about: Metadata for the manifest.

    Raises:
        DataError: The source cannot be read, is empty, or too many rows are skipped.
        StorageError: The folder cannot be written.
    """
    num_records, num_inputs, rejected, ignored = _count(plan.source)
    total = num_records + len(rejected)
    _check_folder(plan)
    if not num_records:
        problem = "the source has no image-text pair to write"
        raise too_many_skipped(problem, rejected, plan.out, part)

    index, count = part
    skipped = list(rejected) if index == 0 else []
    _check_ratio(skipped, total, plan, part)
    sizes = list(_shard_sizes(num_records, plan.samples_per_shard))
    sizes_of_part = sizes[index::count]
    workers = min(workers, len(sizes_of_part)) if len(sizes_of_part) > 1 else 0

    writer = ShardWriter(source=plan.source, out=plan.out, decode=plan.decode)
    entries: list[ShardEntry] = []
    reused = 0
    with Progress("writing", sum(sizes_of_part), "samples") as progress:
        for _, result in map_in_processes(writer, _shard_plans(plan, sizes, part), workers):
            if result.entry and result.entry.samples:
                entries.append(result.entry)
            skipped += result.skipped
            reused += result.reused
            progress.update((result.entry.samples if result.entry else 0) + len(result.skipped))
            _check_ratio(skipped, total, plan, part)

    num_skipped = sum(row.inputs for row in skipped)
    unit = getattr(plan.source, "unit", "rows")
    inputs = Inputs(unit, num_inputs - num_skipped, num_skipped, dict(sorted(ignored.items())))
    about = {**(about or {}), INPUTS_FIELD: inputs._asdict()}
    manifest = _finish(plan, entries, skipped, about) if part == SINGLE_PART else None
    samples, size = sum(entry.samples for entry in entries), sum(entry.bytes for entry in entries)
    return WriteResult(manifest, samples, size, len(entries), reused, skipped, inputs)


def _count(source: Importer) -> tuple[int, int, list[SkippedRow], Counter[str]]:
    """Number of records; inputs of records and rejected rows; rejected rows; ignored inputs."""
    num_records, num_inputs = 0, 0
    rejected: list[SkippedRow] = []
    ignored: Counter[str] = Counter()
    with Progress("counting", 0, "rows") as progress:
        for row in source():
            if isinstance(row, Ignored):
                ignored[row.rule] += row.inputs
                continue
            num_inputs += row.inputs
            if isinstance(row, SkippedRow):
                rejected.append(row)
            else:
                num_records += 1
            progress.update()
    return num_records, num_inputs, rejected, ignored


def _shard_sizes(total: int, samples_per_shard: int) -> Iterator[int]:
    """Sizes that differ by at most one."""
    count = -(-total // samples_per_shard)
    for index in range(count):
        yield total * (index + 1) // count - total * index // count


def _shard_plans(plan: WritePlan, sizes: list[int], part: Part) -> Iterator[ShardPlan]:
    """The shards of a part, with their records."""
    keys = UniqueKeys()
    records = (
        row._replace(key=keys.make(row.key)) for row in plan.source() if isinstance(row, Record)
    )
    for index, size in enumerate(sizes):
        shard_records = [record for _, record in zip(range(size), records, strict=False)]
        if index % part[1] == part[0]:
            yield ShardPlan(f"{plan.prefix}-{index:06d}.tar", shard_records)


def _finish(
    plan: WritePlan,
    entries: list[ShardEntry],
    skipped: list[SkippedRow],
    about: Mapping[str, Any],
) -> Manifest:
    """Write the manifest and the list of skipped rows."""
    if not entries:
        problem = "all rows were skipped; no sample to write"
        raise too_many_skipped(problem, skipped, plan.out)

    counts = dict(sorted(Counter(row.reason for row in skipped).items()))
    metadata = dict(about) | ({SKIPPED_FIELD: counts} if counts else {})
    metadata |= {SOURCE_FIELD: _source_fingerprint(plan.source)}
    manifest = write_manifest(plan.out, entries, metadata)

    if skipped or storage.exists(storage.join(plan.out, SKIPPED_NAME)):
        write_skipped(skipped, plan.out)

    _warn_about_other_shards(plan, {entry.name for entry in entries})
    return manifest


def _check_ratio(skipped: list[SkippedRow], total: int, plan: WritePlan, part: Part) -> None:
    if len(skipped) > int(plan.max_skipped_ratio * total):
        problem = (
            f"{len(skipped):,} of {total:,} pairs in the source were skipped, more than "
            f"--max-skipped-ratio {plan.max_skipped_ratio:g} allows"
        )
        raise too_many_skipped(problem, skipped, plan.out, part)


def _check_folder(plan: WritePlan) -> None:
    """Reject a folder with a dataset written from another source, as shard names would collide."""
    url = storage.join(plan.out, MANIFEST_NAME)
    if plan.overwrite or not storage.exists(url):
        return

    try:
        existing = dict(json.loads(storage.read_bytes(url)))
    except (ValueError, TypeError, RecursionError):
        existing = {}
    if existing.get("shards") and existing.get(SOURCE_FIELD) != _source_fingerprint(plan.source):
        raise DataError(
            f"{storage.redact(plan.out)} contains a dataset written from another source "
            f"({counted(len(existing['shards']), 'shard')}); use another --out, or replace it with "
            f"--overwrite"
        )


def _source_fingerprint(source: Importer) -> str:
    """A hash of the source's files (names only) and options, not of its content."""
    return hashlib.sha256(repr(source).encode()).hexdigest()[:16]


def _warn_about_other_shards(plan: WritePlan, written: set[str]) -> None:
    """Warn about shards of an earlier, larger write: `vlmoe data index` would include them."""
    others = [
        name
        for name in storage.list_names(plan.out)
        if name.startswith(f"{plan.prefix}-") and name.endswith(".tar") and name not in written
    ]
    if others:
        logger.warning(
            "%s contains %s not in its manifest, such as %s; delete what is from an earlier write",
            storage.redact(plan.out),
            counted(len(others), "shard"),
            others[0],
        )
