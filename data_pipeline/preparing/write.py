"""Writes shards from what an importer yields: balanced, reproducible, resumable, in several
processes.

The source is read twice: to count (so that all shards get the same number of samples, give or take
one), and to hand out the records of each shard. A shard's records, and nothing else, decide its
bytes. What was written is noted in `OUT/.parts/`, with a fingerprint of the records: a later call
skips those shards, unless a picture that could not be had is there now. So the tasks of a job array
may write a share each, and a call without a share ends the work: it writes the manifest, and
`left-out.jsonl` with all that became no sample.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.logs import Progress
from data_pipeline.common.processes import WHOLE, Part, in_processes
from data_pipeline.preparing.importers.fill import Sample, samples_of
from data_pipeline.preparing.importers.records import Importer, Keys, LeftOut, Record
from data_pipeline.shards.manifest import MANIFEST_NAME, Manifest, ShardEntry, write_manifest
from data_pipeline.shards.writer import put_shard

logger = logging.getLogger(__name__)

PARTS_FOLDER = ".parts"
LEFT_OUT_NAME = "left-out.jsonl"
_MAY_COME_BACK = ("missing-picture", "unreadable")
"""Pictures left out for these reasons are asked for again: a store or a file server may have been
away."""
_FORMAT = 1
"""Raise it when the same records would become other bytes."""


WRITTEN_FROM = "written_from"
"""Names the source in the manifest."""


@dataclass(frozen=True, kw_only=True)
class WritePlan:
    """What is written, and how."""

    source: Importer
    out: str
    """Folder of the shards; local or in a store."""
    prefix: str = "shard"
    samples_per_shard: int = 1000
    """Wanted samples of a shard; the last one is no smaller than the others."""
    max_left_out: float = 0.01
    """Largest share of the source that may become no sample."""
    check: bool = False
    """Decode every picture."""
    overwrite: bool = False
    """Replace a dataset of another source that is in the folder."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ConfigError(f"--samples-per-shard {self.samples_per_shard}: must be at least 1")
        if not 0 <= self.max_left_out <= 1:
            raise ConfigError(f"--max-left-out {self.max_left_out}: must lie in 0..1")


class Written(NamedTuple):
    """What a call did."""

    manifest: Manifest | None
    """None for a share of the work."""
    samples: int
    bytes: int
    shards: int
    reused: int
    """Shards that were there already."""
    left_out: list[LeftOut]


class ShardPlan(NamedTuple):
    """One shard to write."""

    name: str
    records: list[Record]


class _Result(NamedTuple):
    entry: ShardEntry | None
    left_out: list[LeftOut]
    reused: bool


def write_dataset(
    plan: WritePlan, *, workers: int = 0, part: Part = WHOLE, about: Mapping[str, Any] | None = None
) -> Written:
    """Write a source as shards; see above.

    Raises:
        DataError: The source cannot be read, holds nothing, or too much of it becomes no sample.
        StorageError: The folder cannot be written.
    """
    total, refused = _count(plan.source)
    if not total:
        raise DataError(f"the source has no pair to write{_examples(refused)}")
    _check_folder(plan)
    allowed = int(plan.max_left_out * (total + len(refused)))
    left_out = list(refused) if part[0] == 0 else []
    _check_share(left_out, allowed, total + len(refused), plan)
    entries: list[ShardEntry] = []
    reused = 0
    jobs = list(_shard_sizes(total, plan.samples_per_shard))
    mine = jobs[part[0] :: part[1]]
    workers = min(workers, len(mine)) if len(mine) > 1 else 0
    with Progress("writing", sum(mine), "samples") as progress:
        for _, result in in_processes(partial(_write, plan), _shards(plan, jobs, part), workers):
            if result.entry and result.entry.samples:
                entries.append(result.entry)
            left_out += result.left_out
            reused += result.reused
            progress.update((result.entry.samples if result.entry else 0) + len(result.left_out))
            _check_share(left_out, allowed, total + len(refused), plan)
    manifest = None
    if part == WHOLE:
        if not entries:
            raise DataError(f"no sample was left to write{_examples(left_out)}")
        said = _about(about, left_out) | {WRITTEN_FROM: _name_of(plan.source)}
        manifest = write_manifest(plan.out, entries, said)
        _write_report(plan.out, left_out)
        _warn_of_others(plan, {entry.name for entry in entries})
    return Written(
        manifest,
        sum(e.samples for e in entries),
        sum(e.bytes for e in entries),
        len(entries),
        reused,
        left_out,
    )


def _count(source: Importer) -> tuple[int, list[LeftOut]]:
    total, refused = 0, []
    with Progress("counting", 0, "rows") as progress:
        for row in source():
            if isinstance(row, LeftOut):
                refused.append(row)
            else:
                total += 1
            progress.update()
    return total, refused


def _shard_sizes(total: int, wanted: int) -> Iterator[int]:
    """Sizes that differ by one at most."""
    count = -(-total // wanted)
    for number in range(count):
        yield total * (number + 1) // count - total * number // count


def _shards(plan: WritePlan, sizes: list[int], part: Part) -> Iterator[ShardPlan]:
    """The shards of a share, with their records."""
    keys = Keys()
    records = (
        row._replace(key=keys.make(row.key)) for row in plan.source() if isinstance(row, Record)
    )
    for number, size in enumerate(sizes):
        chosen = [record for _, record in zip(range(size), records, strict=False)]
        if number % part[1] == part[0]:
            yield ShardPlan(f"{plan.prefix}-{number:06d}.tar", chosen)


def _write(plan: WritePlan, shard: ShardPlan) -> _Result:
    """Write one shard, unless it is there."""
    fingerprint = _fingerprint(plan, shard)
    note = storage.join(plan.out, f"{PARTS_FOLDER}/{shard.name}.json")
    if (found := _noted(note, fingerprint, plan.out)) and _is_still_left_out(
        plan, shard, found.left_out
    ):
        return found
    left_out: list[LeftOut] = []
    entry = put_shard(
        _kept(samples_of(shard.records, plan.source, check=plan.check), left_out),
        plan.out,
        shard.name,
    )
    content = {"fingerprint": fingerprint, "entry": asdict(entry), "left_out": left_out}
    storage.write_bytes(
        note, json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
    )
    return _Result(entry, left_out, False)


def _is_still_left_out(plan: WritePlan, shard: ShardPlan, left_out: list[LeftOut]) -> bool:
    """Whether none of the pictures that could not be had is there now."""
    before = {(row.origin, row.reason) for row in left_out if row.reason in _MAY_COME_BACK}
    origins = {origin for origin, _ in before}
    asked = [record for record in shard.records if record.origin in origins]
    for row in samples_of(asked, plan.source, check=plan.check):
        if not isinstance(row, LeftOut) or (row.origin, row.reason) not in before:
            return False
    return True


def _kept(samples: Iterator[Sample | LeftOut], left_out: list[LeftOut]) -> Iterator[Sample]:
    for sample in samples:
        if isinstance(sample, LeftOut):
            left_out.append(sample)
        else:
            yield sample


def _fingerprint(plan: WritePlan, shard: ShardPlan) -> str:
    digest = hashlib.sha256(
        repr((_FORMAT, plan.check, plan.source)).encode("utf-8", "surrogatepass")
    )
    for record in shard.records:
        digest.update(repr(record).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _noted(note: str, fingerprint: str, out: str) -> _Result | None:
    """What an earlier call noted about a shard of the same records, if the shard is still there."""
    try:
        if not storage.exists(note):
            return None
        found = json.loads(storage.read_bytes(note))
        if found["fingerprint"] != fingerprint:
            return None
        entry = ShardEntry(**found["entry"])
        for name, size in ((entry.name, entry.bytes), (entry.index, None)):
            url = storage.join(out, name)
            if not storage.exists(url) or (size is not None and storage.size(url) != size):
                return None
        return _Result(entry, [LeftOut(*row) for row in found["left_out"]], True)
    except (
        ValueError,
        KeyError,
        TypeError,
    ):  # a note of another version, or half of one: write again
        return None


def _check_share(left_out: list[LeftOut], allowed: int, total: int, plan: WritePlan) -> None:
    if len(left_out) > allowed:
        raise DataError(
            f"{len(left_out):,} of the source's {total:,} pairs became no sample, more than --max-left-out "
            f"{plan.max_left_out:g} allows{_examples(left_out)}"
        )


def _warn_of_others(plan: WritePlan, written: set[str]) -> None:
    """Shards of an earlier, larger write would come back with the next `vlmoe data index`."""
    names = storage.list_names(plan.out)
    others = [
        name
        for name in names
        if name.startswith(f"{plan.prefix}-") and name.endswith(".tar") and name not in written
    ]
    if others:
        logger.warning(
            "%s holds %d other shards, such as %s, which are not in its manifest; remove them if they are "
            "of an earlier write",
            storage.redact(plan.out),
            len(others),
            others[0],
        )


def _examples(left_out: list[LeftOut]) -> str:
    if not left_out:
        return ""
    counts = Counter(row.reason for row in left_out)
    named = "; ".join(f"{row.origin}: {row.reason}: {row.detail}" for row in left_out[:3])
    return f" ({', '.join(f'{reason} {count:,}' for reason, count in counts.most_common())}). The first: {named}"


def _check_folder(plan: WritePlan) -> None:
    """Refuse a folder that holds the shards of something else: their names would be taken."""
    url = storage.join(plan.out, MANIFEST_NAME)
    if plan.overwrite or not storage.exists(url):
        return
    try:
        there = dict(json.loads(storage.read_bytes(url)))
    except (ValueError, TypeError, RecursionError):
        there = {}
    if there.get("shards") and there.get(WRITTEN_FROM) != _name_of(plan.source):
        raise DataError(
            f"{storage.redact(plan.out)} holds a dataset that was made of something else ({len(there['shards'])} "
            f"shards, {there.get('total_samples')} samples); choose another --out, or replace it with --overwrite"
        )


def _name_of(source: Importer) -> str:
    """A name for what is written and how it is read, whatever its rows are today."""
    return hashlib.sha256(repr(source).encode()).hexdigest()[:16]


def _about(about: Mapping[str, Any] | None, left_out: list[LeftOut]) -> dict[str, Any]:
    counts = dict(sorted(Counter(row.reason for row in left_out).items()))
    return dict(about or {}) | ({"left_out": counts} if counts else {})


def _write_report(out: str, left_out: list[LeftOut]) -> None:
    url = storage.join(out, LEFT_OUT_NAME)
    if left_out or storage.exists(url):
        lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in left_out]
        storage.write_bytes(url, "".join(lines).encode("utf-8", "backslashreplace"))
