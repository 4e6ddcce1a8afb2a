"""A look at some samples of each source before training: what is skipped or truncated.

A filter on a field that a source does not have, or a caption key that it lacks, would otherwise
drop the whole source while training goes on with the others. The samples are from several shards,
so that a single corrupt or unreachable one does not decide.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_samplers import ListBatchSampler, shard_starts
from data_pipeline.loading.batch_spec import BatchSpec
from data_pipeline.loading.pipeline import BatchPipeline, train_processor
from data_pipeline.loading.sources import Source
from data_pipeline.settings import DataConfig

NUM_SHARDS, SAMPLES_PER_SHARD = 8, 32
"""Evenly spaced shards of a source, and the first samples of each that are processed."""
_BATCH_SIZE = 32
_CONTENT_REASONS = (
    "no-caption",
    "no-image",
    "several-images",
    "several-samples",
    "unsupported-format",
)


@dataclass(frozen=True)
class SourcePreview:
    """What becomes of some samples of a source."""

    name: str
    samples: int
    """Samples that were processed."""
    skipped: Counter[str]
    """Number of skipped samples by reason: corrupt ones and those that a filter excludes."""
    example: str
    """Description of the first skipped sample; empty if there is none."""
    truncated: int
    """Captions with more tokens than the context length."""
    tokens: int
    """Tokens of the captions that are used, start and end included, after truncation."""

    @property
    def used(self) -> int:
        """Samples that are not skipped."""
        return self.samples - self.skipped.total()

    @property
    def skipped_ratio(self) -> float:
        """Fraction of the samples that are not used."""
        return self.skipped.total() / max(1, self.samples)

    @property
    def is_unusable(self) -> bool:
        """Whether the settings exclude every sample; corrupt ones do not count as excluded."""
        excluded = sum(
            count
            for reason, count in self.skipped.items()
            if reason.startswith("filter:") or reason in _CONTENT_REASONS
        )
        return self.samples > 0 and excluded == self.samples


def preview_source(
    source: Source, data: DataConfig, *, tokenizer: Tokenizer, batch: BatchSpec
) -> SourcePreview:
    """Process some samples of a source as in training.

    Args:
        source: The source.
        data: The settings of the run.
        tokenizer: Tokenizer for captions.
        batch: Sizes of images and captions.

    Raises:
        StorageError: The store does not respond.
    """
    sample_ids = _select(source)
    count = len(sample_ids)
    pipeline = BatchPipeline(
        [source.manifest],
        # Only these samples are read, not whole shards.
        replace(data, cache_gib=0.0, fetch_ahead=0),
        sampler=ListBatchSampler(source.manifest, sample_ids, _BATCH_SIZE),
        processors=[train_processor(data.for_source(source.config), batch, seed=0)],
        tokenizer=tokenizer,
        max_open=NUM_SHARDS,
    )
    skipped: Counter[str] = Counter()
    example, truncated, tokens = "", 0, 0
    try:
        for index in range(-(-count // _BATCH_SIZE)):
            packed = pipeline.make(index)
            skipped.update(problem.reason for problem in packed.problems)
            if packed.problems and not example:
                first = packed.problems[0]
                example = f"{first.key}: {first.reason}: {first.detail}"
            truncated += packed.num_truncated
            tokens += packed.tokens
    finally:
        pipeline.close()
    return SourcePreview(source.name, count, skipped, example, truncated, tokens)


def _select(source: Source) -> np.ndarray:
    """Indices of samples over all shards, int64; neighbors are from different shards."""
    entries = source.manifest.shards
    starts = shard_starts([source.manifest])
    usable = [shard for shard, entry in enumerate(entries) if entry.samples]
    spaced = np.linspace(0, len(usable) - 1, min(NUM_SHARDS, len(usable))).round().astype(int)
    by_shard = []
    for shard in (usable[index] for index in spaced):
        kept = np.setdiff1d(np.arange(entries[shard].samples), source.dropped.get(shard, []))
        by_shard.append((starts[shard] + kept[:SAMPLES_PER_SHARD]).tolist())
    rows = itertools.zip_longest(*by_shard)
    return np.array([i for row in rows for i in row if i is not None], dtype=np.int64)
