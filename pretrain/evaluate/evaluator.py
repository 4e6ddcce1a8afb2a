"""Evaluates a model on one set of pairs: retrieval, generated captions, and token accuracy.

The input is an iterable of batches, the output a JSON object. All percentages are 0..100. All
captions of an image match it in retrieval and are references of its generated caption; token
accuracy is that of its first caption, as the batches have it. In retrieval, captions are equal if
they differ at most in case and whitespace, as in training.

Shapes: B pairs of a batch, N images, M distinct texts, D embedding width.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import DataError
from data_pipeline.common.logs import Progress
from data_pipeline.common.seeds import rng
from data_pipeline.common.tables import counted
from data_pipeline.content.captions import hash_caption
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.samples import Batch
from pretrain.evaluate.captions import token_accuracy_percent
from pretrain.evaluate.embed import embed_texts
from pretrain.evaluate.generated_captions import (
    CaptionInput,
    GeneratedCaptions,
    caption_images,
    caption_inputs,
)
from pretrain.evaluate.retrieval import Retrieval, retrieve
from pretrain.model.vision_language import VisionLanguageModel

logger = logging.getLogger(__name__)


class SetOptions(NamedTuple):
    """An evaluation set."""

    name: str
    """Selects the images for generated captions, so they are the same in every evaluation."""
    num_pairs: int
    """Pairs in the set, including corrupt ones."""
    caption_samples: int = 0
    """Number of images for which captions are generated."""
    labels: tuple[str, ...] = ()
    """Candidate texts for retrieval; empty for the distinct captions of the set."""


class _Pass(NamedTuple):
    """Results of one pass over a set."""

    images_ND: Tensor
    captions: list[tuple[str, ...]]
    """All captions of each image."""
    token_counts: list[tuple[int, int]]
    """Correct and all caption tokens of each batch."""
    problems: Counter[str]
    """Corrupt samples by reason."""
    caption_inputs: list[CaptionInput]


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates one model; use inside `evaluation_mode(model)`."""

    model: VisionLanguageModel
    tokenizer: Tokenizer
    context_length: int
    """Maximum tokens of a caption, including start and end tokens."""
    device: torch.device
    """Device of the model."""
    texts_per_forward: int = 128

    def evaluate_set(self, batches: Iterable[Batch], options: SetOptions) -> dict[str, Any]:
        """Evaluate the model on one set, and print progress.

        Args:
            batches: Every pair of the set once.
            options: The set.

        Returns:
            Recall at k and its chance level in both directions, token accuracy, numbers of images,
            texts and corrupt samples, and the entries of `GeneratedCaptions.to_json`.

        Raises:
            DataError: All pairs are corrupt, or no caption of an image is among the labels.
        """
        data = self._encode(batches, options)
        texts, matches = distinct_texts(data.captions, options.labels, name=options.name)
        retrieval = self._retrieve(data.images_ND, texts, matches, name=options.name)
        return {
            "image_to_text": retrieval.image_to_text,
            "text_to_image": retrieval.text_to_image,
            "chance": retrieval.chance_image_to_text,
            "chance_text_to_image": retrieval.chance_text_to_image,
            "images": len(data.captions),
            "texts": len(texts),
            "caption_token_accuracy": token_accuracy_percent(data.token_counts),
            "corrupt_samples": data.problems.total(),
        } | self._generate_with_progress(data.caption_inputs, options.name).to_json()

    def evaluate_captions(self, batches: Iterable[Batch], name: str) -> dict[str, Any]:
        """Generated captions only, for all pairs of `batches`; prints progress."""
        inputs: list[CaptionInput] = []
        problems: Counter[str] = Counter()
        for batch in batches:
            inputs += caption_inputs(batch)
            problems.update(problem.reason for problem in batch.problems)
        if problems:
            number = counted(problems.total(), "corrupt sample")
            logger.warning("skipped %s: %s", number, dict(problems))
        captions = self._generate_with_progress(inputs, name)
        return captions.to_json() | {"corrupt_samples": problems.total()}

    def _generate_with_progress(
        self, inputs: Sequence[CaptionInput], name: str
    ) -> GeneratedCaptions:
        with Progress(name, len(inputs), "generated captions") as progress:
            return self.generate(inputs, progress.update)

    def generate(
        self,
        inputs: Sequence[CaptionInput],
        on_progress: Callable[[int], object] = lambda count: None,
    ) -> GeneratedCaptions:
        """Generate a caption for each image; `on_progress` is called with their number."""
        return caption_images(
            self.model,
            inputs,
            tokenizer=self.tokenizer,
            context_length=self.context_length,
            device=self.device,
            on_progress=on_progress,
        )

    def _encode(self, batches: Iterable[Batch], options: SetOptions) -> _Pass:
        """Embed all images, count correct tokens, and select images for generated captions."""
        selected = frozenset(
            sample_indices(options.name, options.num_pairs, options.caption_samples)
        )
        images_ND: list[Tensor] = []
        captions: list[tuple[str, ...]] = []
        token_counts: list[tuple[int, int]] = []
        problems: Counter[str] = Counter()
        inputs: list[CaptionInput] = []
        for batch in _with_progress(batches, options):
            first = len(captions)
            captions += batch.all_captions
            problems.update(problem.reason for problem in batch.problems)
            if not batch.captions:
                continue

            images = batch.images.to(self.device)
            images_ND.append(self.model.encode_image(images))
            tokens = (batch.text_ids, batch.text_lengths, batch.text_positions)
            token_counts.append(
                self.model.count_correct_tokens(
                    images, *(tensor.to(self.device) for tensor in tokens)
                )
            )
            for row, item in enumerate(caption_inputs(batch)):
                if first + row in selected:
                    inputs.append(item)

        reasons = dict(problems)
        if not captions:
            raise DataError(
                f"evaluation set {options.name!r}: all samples are corrupt: {reasons or 'none'}"
            )
        if problems:
            number = counted(problems.total(), "corrupt sample")
            logger.warning("%s: skipped %s: %s", options.name, number, reasons)
        return _Pass(torch.cat(images_ND), captions, token_counts, problems, inputs)

    def _retrieve(
        self,
        images_ND: Tensor,
        texts: Sequence[str],
        matches: Sequence[tuple[int, int]],
        *,
        name: str,
    ) -> Retrieval:
        with Progress(name, len(texts), "texts") as progress:
            text_MD = embed_texts(
                self.model,
                self.tokenizer,
                texts,
                context_length=self.context_length,
                texts_per_forward=self.texts_per_forward,
                device=self.device,
                on_progress=progress.update,
            )
        return retrieve(images_ND, text_MD, torch.tensor(matches, device=self.device))


def _with_progress(batches: Iterable[Batch], options: SetOptions) -> Iterator[Batch]:
    """The batches; a batch is counted when the next one is read."""
    with Progress(options.name, options.num_pairs, "pairs") as progress:
        for batch in batches:
            yield batch
            progress.update(len(batch.captions) + len(batch.problems))


def distinct_texts(
    captions: Sequence[Sequence[str]], labels: Sequence[str], *, name: str = "the set"
) -> tuple[list[str], list[tuple[int, int]]]:
    """The candidate texts, and all pairs of an image and a text of it.

    Args:
        captions: Captions of each image, at least one.
        labels: Candidate texts; empty for the distinct captions, in order of appearance.
        name: Name of the set, for errors.

    Returns:
        The texts, and image index and text index of each pair, once, in order of the images.

    Raises:
        DataError: No caption of an image is among the labels.
    """
    index_of_hash: dict[int, int] = {}
    texts: list[str] = []
    for text in labels or itertools.chain.from_iterable(captions):
        if index_of_hash.setdefault(hash_caption(text), len(texts)) == len(texts):
            texts.append(text)

    matches: list[tuple[int, int]] = []
    missing: list[str] = []
    for image, of_image in enumerate(captions):
        hashes = dict.fromkeys(hash_caption(text) for text in of_image)
        found = [(image, index_of_hash[item]) for item in hashes if item in index_of_hash]
        matches += found
        if not found:
            missing.append(of_image[0])
    if missing:
        raise DataError(
            f"the {counted(len(texts), 'label')} of {name!r} include no caption of "
            f"{counted(len(missing), 'image')} of it, such as {missing[0]!r}; add one for each to "
            f"the labels file, or omit the file to rank against the captions of the set"
        )
    return texts, matches


def sample_indices(name: str, total: int, count: int) -> tuple[int, ...]:
    """A random sample of `count` indices below `total`, ascending; seeded by `name` alone."""
    sampled = rng("caption-samples", name).choice(total, size=min(count, total), replace=False)
    return tuple(sorted(sampled.tolist()))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; restores the previous mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
