"""Sample pictures with the captions that the model writes, for TensorBoard."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.loading.loader import read_all
from data_pipeline.samples import Batch
from data_pipeline.shards.manifest import load_manifest
from pretrain.evaluate.generation import write_captions
from pretrain.parallel.engine import TrainEngine
from pretrain.train.build import Parts
from pretrain.train.reporter import Reporter


@dataclass(frozen=True)
class RankZeroLogits:
    """Rank 0's logits on every rank.

    Ranks that judge for themselves may differ in the last bit, since their rows stand at different
    places of an expert's batch. One that ends a caption a token sooner would leave the others
    waiting in an exchange.
    """

    engine: TrainEngine

    def next_token_logits(self, images: Tensor, text_ids: Tensor, text_lengths: Tensor) -> Tensor:
        """Logits of the token after the last valid one, `[pictures, vocabulary]`. Collective."""
        logits = self.engine.model.next_token_logits(images, text_ids, text_lengths)
        return self.engine.total(logits if self.engine.rank == 0 else torch.zeros_like(logits))


@dataclass(frozen=True, kw_only=True)
class CaptionSampleLogger:
    """A few fixed pictures. All ranks write captions for the same ones, since experts live on all
    ranks."""

    parts: Parts
    batch: Batch

    @staticmethod
    def open(parts: Parts) -> CaptionSampleLogger | None:
        """The first pictures of the first held-out set, or of the training data; None when turned
        off."""
        run = parts.run
        if not run.log.captions_every_steps or not run.log.num_captions:
            return None
        source = (
            load_manifest(run.eval.sets[0].shards) if run.eval.sets else parts.sources[0].manifest
        )
        batches = read_all(
            source,
            tokenizer=parts.tokenizer,
            data=parts.data,
            image_size=run.model.image_size,
            context_length=run.model.context_length,
            micro_batch_size=run.log.num_captions,
            indices=range(min(run.log.num_captions, source.total_samples)),
        )
        return CaptionSampleLogger(parts=parts, batch=next(iter(batches)))

    def is_due(self, step: int, *, last: bool) -> bool:
        """Whether pictures are shown after this step."""
        return last or step % self.parts.run.log.captions_every_steps == 0

    def show(self, reporter: Reporter | None, step: int) -> None:
        """Write captions and show them. Collective."""
        parts, engine = self.parts, self.parts.engine
        tokenizer = parts.tokenizer
        # As when it is judged: every token gets its best experts, and no batch mate takes their
        # place.
        engine.model.eval()
        ids = write_captions(
            RankZeroLogits(engine),
            self.batch.images.to(engine.device),
            start_id=tokenizer.start_id,
            end_id=tokenizer.end_id,
            max_length=parts.run.model.context_length,
        )
        engine.model.train()
        written = [tokenizer.decode(tokens) for tokens in ids]
        if reporter is not None:
            reporter.pictures(step, self.batch.images.numpy(), written, list(self.batch.captions))
