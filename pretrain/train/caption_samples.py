"""Logs captions that the model generates for a few fixed images during training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.loading.batch_spec import BatchSpec
from data_pipeline.loading.loader import read_all
from data_pipeline.samples import Batch
from data_pipeline.shards.manifest import load_manifest
from pretrain.evaluate.generation import generate_captions
from pretrain.parallel.engine import Engine
from pretrain.train.components import TrainComponents
from pretrain.train.data import index_address
from pretrain.train.reporter import Reporter


@dataclass(frozen=True)
class RankZeroLogits:
    """Next-token logits of rank 0, on every rank.

    Logits computed on different ranks may differ in the last bit, since a row has different
    positions in the experts' batches. Ranks could then end a caption at different lengths, and the
    one that ends first would leave the others waiting in a collective.
    """

    engine: Engine

    def next_token_logits(self, images: Tensor, text_ids: Tensor, text_lengths: Tensor) -> Tensor:
        """Logits of the token after the last valid one, `[images, vocabulary]`. Collective."""
        logits = self.engine.model.next_token_logits(images, text_ids, text_lengths)
        return self.engine.communicator.all_reduce_sum(
            logits if self.engine.communicator.rank == 0 else torch.zeros_like(logits)
        )


@dataclass(frozen=True, kw_only=True)
class CaptionSampleLogger:
    """Generates and logs captions of a few fixed images.

    All ranks generate captions of the same images, since each rank holds only some experts.
    """

    components: TrainComponents
    batch: Batch

    @staticmethod
    def open(components: TrainComponents) -> CaptionSampleLogger | None:
        """Load the first images of the first evaluation set, or else of the training data.

        Collective. Returns None if caption samples are disabled.
        """
        run = components.run
        if not run.log.captions_every_steps or not run.log.num_captions:
            return None
        if run.eval.sets:
            first, communicator = run.eval.sets[0], components.engine.communicator
            address = index_address(run, first.shards, components.out, communicator)
            manifest, data = load_manifest(address), first.data(components.data)
        else:
            source = components.sources[0]
            manifest, data = source.manifest, components.data.for_source(source.config)
        batches = read_all(
            manifest,
            tokenizer=components.tokenizer,
            data=data,
            batch=BatchSpec(
                image_size=run.model.image_size,
                context_length=run.model.context_length,
                micro_batch_size=run.log.num_captions,
            ),
            indices=range(min(run.log.num_captions, manifest.total_samples)),
        )
        return CaptionSampleLogger(components=components, batch=next(iter(batches)))

    def is_due(self, step: int, *, last: bool) -> bool:
        """Whether captions are generated after this step."""
        return last or step % self.components.run.log.captions_every_steps == 0

    def log(self, reporter: Reporter | None, step: int) -> None:
        """Generate captions and log them. Collective."""
        components, engine = self.components, self.components.engine
        tokenizer = components.tokenizer
        # In evaluation mode routing has no noise and no capacity limit.
        engine.model.eval()
        token_ids = generate_captions(
            RankZeroLogits(engine),
            self.batch.images.to(engine.communicator.device),
            start_id=tokenizer.start_id,
            end_id=tokenizer.end_id,
            max_length=components.run.model.context_length,
        )
        engine.model.train()
        captions = [tokenizer.decode(ids) for ids in token_ids]
        if reporter is not None:
            images = self.batch.images.numpy()
            reporter.log_captions(step, images, captions, list(self.batch.captions))
