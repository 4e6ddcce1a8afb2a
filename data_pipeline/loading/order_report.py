"""Which samples each rank reads in given steps, and how well they are shuffled.

Computed from manifests and settings alone; no shard is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.common.errors import DataError
from data_pipeline.common.escaping import escape_control
from data_pipeline.common.tables import counted, format_table
from data_pipeline.loading.batch_samplers import TrainBatchSampler
from data_pipeline.loading.sources import Source, make_order
from data_pipeline.order.micro_batches import micro_batches_per_step
from data_pipeline.order.shuffle_quality import ShuffleQuality, format_quality_table
from data_pipeline.order.shuffle_quality import shuffle_quality as compare_with_perfect
from data_pipeline.order.state import merge_ranges, phase_seed
from data_pipeline.samples import SampleRef
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import load_index
from data_pipeline.shards.shard_index import ShardIndex

_FIELDS = ("position", "source", "epoch", "shard", "sample", "key")

Step = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class OrderSettings:
    """What determines the order of samples, besides the sources."""

    data: DataConfig
    seed: int
    global_batch_size: int
    micro_batch_size: int
    world_size: int = 1
    skip: tuple[tuple[int, int], ...] = ()
    """Ranges of positions that are left out, `[first, end)`."""

    @property
    def order_seed(self) -> int:
        """Seed of the order of the phase `data.phase`."""
        return phase_seed(self.seed, self.data.phase)


def list_steps(
    sources: Sequence[Source], settings: OrderSettings, steps: range, *, keys: bool
) -> Iterator[Step]:
    """The samples of each step as JSON values, by rank and micro-batch.

    Steps and positions count from the beginning of the phase `data.phase`.

    Args:
        sources: The mixture.
        settings: The order and its split over ranks.
        steps: Steps, counted from 1.
        keys: Read shard indices to name the samples.

    Raises:
        ConfigError: The global batch cannot be divided among the ranks.
    """
    count = micro_batches_per_step(
        settings.global_batch_size, settings.micro_batch_size, settings.world_size
    )
    order = make_order(sources, settings.order_seed, settings.data.shuffle_window)
    names = _SampleNames(sources, keys=keys, data=settings.data)
    samplers = [
        TrainBatchSampler(
            order=order,
            origin=0,
            skip=merge_ranges(settings.skip),
            rank=rank,
            global_batch_size=settings.global_batch_size,
            micro_batch_size=settings.micro_batch_size,
            micro_batches=count,
            world_size=settings.world_size,
        )
        for rank in range(settings.world_size)
    ]
    for step in steps:
        micro_batches = []
        for micro_batch in range(count):
            for rank, sampler in enumerate(samplers):
                samples = _samples(sampler, (step - 1) * count + micro_batch, names)
                micro_batches.append({"rank": rank, "micro_batch": micro_batch, "samples": samples})
        position_after = samplers[0].step_end(step - 1)
        yield {"step": step, "position_after": position_after, "micro_batches": micro_batches}


def format_step(step: Step) -> str:
    """One step as a table for each micro-batch, with the same column widths."""
    rows = [sample for micro in step["micro_batches"] for sample in micro["samples"]]
    # Escaped, because keys and shard names are untrusted.
    cells = [[escape_control(str(row[name])) for name in _FIELDS] for row in rows]
    header, *body = format_table(_FIELDS, cells, align="l", rule=False).splitlines()
    lines, table = [f"step {step['step']:,}"], iter(body)
    for micro in step["micro_batches"]:
        lines.append(f"  rank {micro['rank']}, micro-batch {micro['micro_batch']}")
        lines.append(f"    {header}")
        lines += [f"    {next(table)}" for _ in micro["samples"]]
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class SourceQuality:
    """Shuffle quality of one source."""

    name: str
    samples: int
    shards: int
    batch: int
    """Samples of the source in a global batch."""
    shuffled: ShuffleQuality
    perfect: ShuffleQuality
    """That of a random permutation."""

    def to_json(self) -> dict[str, Any]:
        """Both qualities as JSON values."""
        return {"shuffled": asdict(self.shuffled), "perfect": asdict(self.perfect)}

    def text(self, window: int) -> str:
        """A table; `window` is the number of shards that are shuffled together."""
        return (
            f"{escape_control(self.name)}: {counted(self.samples, 'sample')} in "
            f"{counted(self.shards, 'shard')}, shuffle_window {window}, "
            f"{self.batch:,} of them in a batch\n"
            f"{format_quality_table(self.shuffled, self.perfect)}"
        )


def measure_shuffle(sources: Sequence[Source], settings: OrderSettings) -> list[SourceQuality]:
    """Shuffle quality of each source, for the part of a batch that the source provides; sources
    without samples are omitted."""
    window = settings.data.shuffle_window
    fractions = make_order(sources, settings.order_seed, window).fractions.at(0)
    results = []
    for source, fraction in zip(sources, fractions, strict=True):
        sizes = [
            entry.samples - len(source.dropped.get(shard, ()))
            for shard, entry in enumerate(source.manifest.shards)
        ]
        if not sum(sizes):
            continue
        batch = max(1, round(settings.global_batch_size * fraction))
        shuffled, perfect = compare_with_perfect(sizes, settings.order_seed, window, batch)
        results.append(
            SourceQuality(
                name=source.name,
                samples=sum(sizes),
                shards=len(sizes),
                batch=batch,
                shuffled=shuffled,
                perfect=perfect,
            )
        )
    return results


def _samples(sampler: TrainBatchSampler, index: int, names: _SampleNames) -> list[dict[str, Any]]:
    """The samples of one rank's micro-batch `index`, counted from the start of training."""
    positions = [position for part in sampler.positions(index) for position in part]
    return [
        dict(zip(_FIELDS, (position, *names.of(ref)), strict=True))
        for position, ref in zip(positions, sampler.refs(index), strict=True)
    ]


class _SampleNames:
    """Names of samples; shard indices are read on first use."""

    def __init__(self, sources: Sequence[Source], *, keys: bool, data: DataConfig) -> None:
        self._shards = [(source, entry) for source in sources for entry in source.manifest.shards]
        self._keys, self._data = keys, data
        self._indices: dict[int, ShardIndex | None] = {}

    def of(self, ref: SampleRef) -> tuple[str, int, str, int, str]:
        """Source, epoch, shard, index in the shard, key."""
        source, entry = self._shards[ref.shard]
        return source.name, ref.epoch, entry.name, ref.sample, self._key(ref.shard, ref.sample)

    def _key(self, shard: int, sample: int) -> str:
        if not self._keys:
            return ""
        if shard not in self._indices:
            self._indices[shard] = self._load(shard)
        index = self._indices[shard]
        return index.key(sample) if index is not None else "#corrupt-index"

    def _load(self, shard: int) -> ShardIndex | None:
        source, entry = self._shards[shard]
        try:
            return load_index(
                source.manifest,
                entry,
                cache_dir=self._data.cache_dir,
                timeout_seconds=self._data.request_seconds,
            )
        except DataError:
            # Training continues too, and counts the samples of the shard as corrupt.
            return None
