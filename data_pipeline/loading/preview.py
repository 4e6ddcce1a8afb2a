"""A look at the first samples of each source before training: what is skipped, what is cut.

A filter on a field that a source does not have, or a caption key that it lacks, would otherwise
drop the whole source while training goes on with the others.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_samplers import ListBatchSampler
from data_pipeline.loading.batch_spec import BatchSpec
from data_pipeline.loading.pipeline import BatchPipeline, train_processor
from data_pipeline.loading.sources import Source
from data_pipeline.settings import DataConfig

NUM_SAMPLES = 256
"""First samples of each source that are processed."""
_BATCH_SIZE = 32
_MAX_TOKENS = 1 << 20


@dataclass(frozen=True)
class SourcePreview:
    """What becomes of the first samples of a source."""

    name: str
    samples: int
    """Samples that were read; dropped ones of a drop-list included."""
    skipped: Counter[str]
    """Number of skipped samples by reason: corrupt ones and those that a filter excludes."""
    example: str
    """Description of the first skipped sample; empty if there is none."""
    truncated: int
    """Captions with more tokens than the context length."""

    @property
    def skipped_ratio(self) -> float:
        """Fraction of the samples that are not used."""
        return self.skipped.total() / max(1, self.samples)


def preview_source(
    source: Source, data: DataConfig, *, tokenizer: Tokenizer, batch: BatchSpec
) -> SourcePreview:
    """Process the first samples of a source as in training.

    Args:
        source: The source.
        data: The settings of the run.
        tokenizer: Tokenizer for captions.
        batch: Sizes of images and captions.

    Raises:
        StorageError: The store does not respond.
    """
    count = min(NUM_SAMPLES, source.manifest.total_samples)
    pipeline = BatchPipeline(
        [source.manifest],
        # Only these samples are read, not whole shards.
        replace(data, cache_gib=0.0, fetch_ahead=0),
        sampler=ListBatchSampler(source.manifest, np.arange(count), _BATCH_SIZE),
        processors=[train_processor(data.for_source(source.config), batch, seed=0)],
        tokenizer=tokenizer,
        max_open=1,
    )
    skipped: Counter[str] = Counter()
    example, truncated = "", 0
    try:
        for index in range(-(-count // _BATCH_SIZE)):
            packed = pipeline.make(index)
            skipped.update(problem.reason for problem in packed.problems)
            if packed.problems and not example:
                first = packed.problems[0]
                example = f"{first.key}: {first.reason}: {first.detail}"
            truncated += sum(
                len(tokenizer.encode_clean(caption, _MAX_TOKENS)) > batch.context_length
                for caption in packed.captions
            )
    finally:
        pipeline.close()
    return SourcePreview(source.name, count, skipped, example, truncated)
