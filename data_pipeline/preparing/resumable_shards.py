"""Writes one shard from source records, or reuses it if an earlier call wrote the same.

For each written shard, `OUT/.parts/` records a fingerprint of its records. A later call with equal
records reuses the shard, unless an image that was unavailable before can be read now.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.json_file import write_json
from data_pipeline.preparing.importers.load_samples import Sample, load_samples
from data_pipeline.preparing.importers.records import Importer, Record, SkippedRow
from data_pipeline.shards.manifest import ShardEntry
from data_pipeline.shards.writer import write_shard

PARTS_FOLDER = ".parts"
_TEMPORARY_REASONS = ("missing-image", "unreadable")
"""Images skipped for these reasons are tried again: a store or file server may have been down."""
_FORMAT_VERSION = 1
"""Increment when the same records produce different bytes."""


class ShardPlan(NamedTuple):
    """A shard to write."""

    name: str
    records: list[Record]


class ShardResult(NamedTuple):
    """A shard that was written or reused."""

    entry: ShardEntry | None
    skipped: list[SkippedRow]
    reused: bool


@dataclass(frozen=True, kw_only=True)
class ShardWriter:
    """Writes or reuses shards; picklable."""

    source: Importer
    out: str
    """Folder of the shards; local or in an object store."""
    decode: bool
    """Decode every image and skip corrupt ones."""

    def __call__(self, shard: ShardPlan) -> ShardResult:
        """Write one shard, unless it is already written."""
        fingerprint = self._fingerprint(shard)
        record_url = storage.join(self.out, f"{PARTS_FOLDER}/{shard.name}.json")
        previous = _previous_result(record_url, fingerprint, self.out)
        if previous and self._is_still_skipped(shard, previous.skipped):
            return previous

        skipped: list[SkippedRow] = []
        samples = load_samples(shard.records, self.source, decode=self.decode)
        entry = write_shard(_split_skipped(samples, skipped), self.out, shard.name)
        content = {"fingerprint": fingerprint, "entry": asdict(entry), "skipped": skipped}
        write_json(record_url, content, indent=None)
        return ShardResult(entry, skipped, False)

    def _is_still_skipped(self, shard: ShardPlan, skipped: list[SkippedRow]) -> bool:
        """Whether all images that were unavailable before are still unavailable."""
        before = {(row.origin, row.reason) for row in skipped if row.reason in _TEMPORARY_REASONS}
        origins = {origin for origin, _ in before}
        records = [record for record in shard.records if record.origin in origins]
        for row in load_samples(records, self.source, decode=self.decode):
            if not isinstance(row, SkippedRow) or (row.origin, row.reason) not in before:
                return False
        return True

    def _fingerprint(self, shard: ShardPlan) -> str:
        settings = repr((_FORMAT_VERSION, self.decode, self.source))
        digest = hashlib.sha256(settings.encode("utf-8", "surrogatepass"))
        for record in shard.records:
            digest.update(repr(record).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def _split_skipped(
    samples: Iterator[Sample | SkippedRow], skipped: list[SkippedRow]
) -> Iterator[Sample]:
    """Yield the samples and collect the skipped rows."""
    for sample in samples:
        if isinstance(sample, SkippedRow):
            skipped.append(sample)
        else:
            yield sample


def _previous_result(record_url: str, fingerprint: str, out: str) -> ShardResult | None:
    """The result of an earlier call for the same records, if its files still exist."""
    try:
        if not storage.exists(record_url):
            return None
        content = json.loads(storage.read_bytes(record_url))
        if content["fingerprint"] != fingerprint:
            return None

        entry = ShardEntry(**content["entry"])
        for name, size in ((entry.name, entry.bytes), (entry.index, None)):
            url = storage.join(out, name)
            if not storage.exists(url) or (size is not None and storage.size(url) != size):
                return None
        return ShardResult(entry, [SkippedRow(*row) for row in content["skipped"]], True)
    except (ValueError, KeyError, TypeError):
        return None  # a truncated record, or one of another version: write the shard again
