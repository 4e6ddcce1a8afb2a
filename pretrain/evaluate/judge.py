"""Judges a model on one set of pairs: retrieval, written captions, and token accuracy.

Batches come in, a JSON object goes out; where they come from is `command`'s affair. All percentages
are 0..100. Captions count as equal when they differ at most in capitals and blanks, as in training.

Shapes: B pairs of a batch, N images, M distinct texts, D embedding width.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import DataError
from data_pipeline.common.seeds import rng
from data_pipeline.content.captions import caption_hash
from data_pipeline.samples import Batch
from pretrain.evaluate.captions import TokenModel, exact_percent, token_percent
from pretrain.evaluate.embed import TextCoder, TextModel, embed_texts
from pretrain.evaluate.generation import WritingModel, write_captions
from pretrain.evaluate.retrieval import retrieve

logger = logging.getLogger(__name__)

_EXAMPLES = 10


class JudgedModel(WritingModel, TokenModel, TextModel, Protocol):
    """What judging needs from a model."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit vectors, `[pairs, embed_dim]`."""


class JudgedTokenizer(TextCoder, Protocol):
    """What judging needs from a tokenizer."""

    @property
    def start_id(self) -> int: ...
    @property
    def end_id(self) -> int: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class Picture(NamedTuple):
    """A picture for which a caption is to be written."""

    key: str
    caption: str
    """The true one; empty where there is none."""
    image: Tensor
    """uint8 `[3, side, side]`."""


class Writing(NamedTuple):
    """Pictures of a set for which captions are written."""

    keys: tuple[str, ...]
    true: tuple[str, ...]
    written: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Exact match in percent, on how many pictures, and the first few captions."""
        shown = list(zip(self.keys, self.written, self.true, strict=True))[:_EXAMPLES]
        return {
            "caption_exact": exact_percent(self.written, self.true),
            "caption_samples": len(self.true),
            "examples": [
                {"key": key, "written": written, "true": true} for key, written, true in shown
            ],
        }


def evaluate_set(
    model: JudgedModel,
    batches: Iterable[Batch],
    *,
    tokenizer: JudgedTokenizer,
    name: str,
    total: int,
    labels: Sequence[str] = (),
    context_length: int,
    caption_samples: int,
    device: torch.device,
    texts_per_forward: int = 128,
) -> dict[str, Any]:
    """Judge a model on one set.

    Args:
        model: In evaluation mode (see `judging`).
        batches: Every pair of the set once.
        tokenizer: The run's.
        name: Of the set; the pictures for written captions are drawn from it, so they are always
            the same.
        total: Pairs in the set, bad ones included.
        labels: Texts to rank each picture against; empty means the distinct captions of the set.
        context_length: Most tokens of a caption, both marks included.
        caption_samples: Pictures for which captions are written.
        device: Of the model.
        texts_per_forward: Texts of one forward pass.

    Raises:
        DataError: No pair is good, or a caption is not among the labels.
    """
    chosen = frozenset(choose_samples(name, total, caption_samples))
    images_ND: list[Tensor] = []
    captions: list[str] = []
    token_counts: list[tuple[int, int]] = []
    problems: Counter[str] = Counter()
    kept: list[Picture] = []
    for batch in batches:
        first = len(captions)
        captions += batch.captions
        problems.update(problem.reason for problem in batch.problems)
        if not batch.captions:
            continue
        images = batch.images.to(device)
        images_ND.append(model.encode_image(images))
        tokens = (batch.text_ids, batch.text_lengths, batch.text_positions)
        token_counts.append(
            model.caption_token_hits(images, *(tensor.to(device) for tensor in tokens))
        )
        kept += [picture for row, picture in enumerate(_pictures(batch)) if first + row in chosen]
    if not captions:
        raise DataError(
            f"evaluation set {name!r} has no good pair; bad ones: {dict(problems) or 'none'}"
        )
    if problems:
        logger.warning("%s: %d bad samples left out: %s", name, problems.total(), dict(problems))
    texts, text_of_image = distinct_texts(captions, labels, name=name)
    text_MD = embed_texts(
        model,
        tokenizer,
        texts,
        context_length=context_length,
        texts_per_forward=texts_per_forward,
        device=device,
    )
    retrieval = retrieve(torch.cat(images_ND), text_MD, torch.tensor(text_of_image, device=device))
    writing = write_for(
        model, kept, tokenizer=tokenizer, context_length=context_length, device=device
    )
    return {
        "image_to_text": retrieval.image_to_text,
        "text_to_image": retrieval.text_to_image,
        "chance": retrieval.chance_image_to_text,
        "chance_text_to_image": retrieval.chance_text_to_image,
        "images": len(captions),
        "texts": len(texts),
        "caption_token_accuracy": token_percent(token_counts),
        "bad_samples": problems.total(),
    } | writing.to_json()


def evaluate_captions(
    model: WritingModel,
    batches: Iterable[Batch],
    *,
    tokenizer: JudgedTokenizer,
    context_length: int,
    device: torch.device,
) -> dict[str, Any]:
    """Only written captions, for all pairs of `batches`; arguments as in `evaluate_set`."""
    pictures: list[Picture] = []
    problems: Counter[str] = Counter()
    for batch in batches:
        pictures += _pictures(batch)
        problems.update(problem.reason for problem in batch.problems)
    if problems:
        logger.warning("%d bad samples left out: %s", problems.total(), dict(problems))
    writing = write_for(
        model, pictures, tokenizer=tokenizer, context_length=context_length, device=device
    )
    return writing.to_json() | {"bad_samples": problems.total()}


def write_for(
    model: WritingModel,
    pictures: Sequence[Picture],
    *,
    tokenizer: JudgedTokenizer,
    context_length: int,
    device: torch.device,
    pictures_per_forward: int = 64,
) -> Writing:
    """Write a caption for each picture."""
    written: list[str] = []
    for first in range(0, len(pictures), pictures_per_forward):
        images = torch.stack(
            [picture.image for picture in pictures[first : first + pictures_per_forward]]
        )
        ids = write_captions(
            model,
            images.to(device),
            start_id=tokenizer.start_id,
            end_id=tokenizer.end_id,
            max_length=context_length,
        )
        written += [tokenizer.decode(tokens) for tokens in ids]
    return Writing(
        tuple(p.key for p in pictures), tuple(p.caption for p in pictures), tuple(written)
    )


def distinct_texts(
    captions: Sequence[str], labels: Sequence[str], *, name: str = "the set"
) -> tuple[list[str], list[int]]:
    """The texts to rank against, and which of them is each caption's.

    Args:
        captions: Caption of each image.
        labels: Texts to rank against; empty means the distinct captions, in order of appearance.
        name: Of the set, for errors.

    Raises:
        DataError: A caption is not among the labels.
    """
    place: dict[int, int] = {}
    texts: list[str] = []
    for text in labels or captions:
        if place.setdefault(caption_hash(text), len(texts)) == len(texts):
            texts.append(text)
    missing = [caption for caption in captions if caption_hash(caption) not in place]
    if missing:
        raise DataError(
            f"{len(set(missing))} captions of {name!r} are not among its {len(texts)} labels, for example "
            f"{missing[0]!r}; add them to the labels file, or leave it out to rank against the captions"
        )
    return texts, [place[caption_hash(caption)] for caption in captions]


def choose_samples(name: str, total: int, count: int) -> tuple[int, ...]:
    """A fixed random choice of `count` places in a set of `total`, rising; from name and sizes
    only."""
    drawn = rng("caption-samples", name).choice(total, size=min(count, total), replace=False)
    return tuple(sorted(drawn.tolist()))


@contextmanager
def judging(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and back to what it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _pictures(batch: Batch) -> list[Picture]:
    # A clone, since a row of the batch would keep the whole batch in memory.
    return [
        Picture(key, caption, image.clone())
        for key, caption, image in zip(batch.keys, batch.captions, batch.images, strict=True)
    ]
