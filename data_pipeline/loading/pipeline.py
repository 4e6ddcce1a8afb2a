"""The stages of the loader in order: from the index of a batch to the batch.

    stage                                                     code
    1 select   batch index -> SampleRefs                      batch_samplers.py, order/
    2 read     SampleRefs -> RawSamples                       batch_reader.py, reading/
    3 process  RawSample -> ProcessedSample: select a         content/sample_processor.py
               caption, filter, decode and augment the
               image, tokenize
    4 collate  ProcessedSamples -> PackedBatch                collate.py
    5 send     PackedBatch -> Batch, from a worker process    batch_stream.py
    6 group    Batches -> the step and the state after it     loader.py

`BatchPipeline` is stages 1 to 4: a pure function of the index, apart from failures. It runs in the
training process or in worker processes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset

from data_pipeline.common.errors import DataError, VlmError, error_values
from data_pipeline.content.sample_processor import SampleProcessor
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_reader import BatchReader
from data_pipeline.loading.batch_samplers import BatchSampler, shard_starts
from data_pipeline.loading.batch_spec import BatchSpec
from data_pipeline.loading.collate import BatchBuilder, PackedBatch
from data_pipeline.loading.worker_process import WorkerError
from data_pipeline.samples import ProcessedSample, RawSample, SampleProblem, SampleRef
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest


class BatchPipeline(Dataset[PackedBatch | WorkerError]):
    """Map-style dataset whose items are whole batches."""

    def __init__(
        self,
        manifests: Sequence[Manifest],
        data: DataConfig,
        *,
        sampler: BatchSampler,
        processors: Sequence[SampleProcessor],
        tokenizer: Tokenizer,
        max_open: int,
    ) -> None:
        """Put the stages together; files are opened with the first batch.

        Args:
            manifests: Their shards, concatenated, are those of the sampler.
            data: How shards are read.
            sampler: The samples of each batch.
            processors: Makes processed samples from stored ones, one for each manifest; all have
                the same image size and context length.
            tokenizer: Tokenizer for captions.
            max_open: Maximum number of open shards.
        """
        self._sampler, self._tokenizer = sampler, tokenizer
        self._processors = tuple(processors)
        counts = [len(manifest.shards) for manifest in manifests]
        self._manifest_of = np.repeat(np.arange(len(counts)), counts).tolist()
        """Index of the manifest of each shard."""
        self._reader = BatchReader(manifests, data, sampler.shards_from, max_open=max_open)
        self._starts = shard_starts(manifests)

    def __getitem__(self, index: int) -> PackedBatch | WorkerError:
        try:
            return self.make(index)
        except VlmError as error:
            return WorkerError(tuple(error_values(error)))

    def make(self, index: int) -> PackedBatch:
        """Build one batch.

        Raises:
            VlmError: A problem of the whole run, such as its settings. Corrupt samples and shards
                raise no error: the samples are listed in the batch's `problems`.
        """
        start = time.perf_counter()
        refs = self._sampler.refs(index)
        raw_samples = self._reader.read(index, refs)

        builder = self._new_batch(len(refs))
        problems: list[SampleProblem] = []
        for slot, (ref, raw) in enumerate(zip(refs, raw_samples, strict=True)):
            sample_id = int(self._starts[ref.shard]) + ref.sample
            sample = self._process(ref, raw, builder.image_slot)
            if isinstance(sample, SampleProblem):
                problems.append(sample._replace(id=sample_id))
            else:
                builder.add(sample, sample_id, slot)

        return builder.packed(problems, time.perf_counter() - start)

    def close(self) -> None:
        """Close the files that were opened in this process."""
        self._reader.close()

    def _process(
        self, ref: SampleRef, raw: RawSample | SampleProblem, out: np.ndarray
    ) -> ProcessedSample | SampleProblem:
        """The sample with its image in `out`, or the reason why it is skipped."""
        if isinstance(raw, SampleProblem):
            return raw
        try:
            processor = self._processors[self._manifest_of[ref.shard]]
            return processor.process(raw, ref.epoch, self._tokenizer, out)
        except DataError as error:
            if not error.slug:
                raise
            return SampleProblem(raw.shard, raw.key, error.slug, str(error))

    def _new_batch(self, capacity: int) -> BatchBuilder:
        return BatchBuilder(
            capacity,
            image_size=self._processors[0].image_size,
            context_length=self._processors[0].context_length,
            pad_id=self._tokenizer.pad_id,
        )


def eval_processor(data: DataConfig, batch: BatchSpec) -> SampleProcessor:
    """Stage 3 without augmentation and filters, and with the first caption and all others."""
    return SampleProcessor(
        image_size=batch.image_size,
        context_length=batch.context_length,
        image_keys=tuple(data.image_keys),
        image_mode=data.image_mode,
        caption_keys=tuple(data.caption_keys),
        caption_weights=tuple(data.caption_weights),
        limits=data.limits,
    )


def train_processor(data: DataConfig, batch: BatchSpec, seed: int) -> SampleProcessor:
    """Stage 3 with augmentation, filters and sampled captions; `data` are those of the source."""
    return replace(
        eval_processor(data, batch), seed=seed, augment=data.augment, filters=data.filters
    )
