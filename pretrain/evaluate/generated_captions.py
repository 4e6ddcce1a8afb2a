"""Generates captions for the images of a set, and scores them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.samples import Batch
from pretrain.evaluate.captions import exact_match_percent
from pretrain.evaluate.generation import generate_captions
from pretrain.model.vision_language import VisionLanguageModel

IMAGES_PER_FORWARD = 64
MAX_EXAMPLES = 10
"""Captions listed in the results."""


class CaptionInput(NamedTuple):
    """An image for which a caption is generated."""

    key: str
    references: tuple[str, ...]
    """The captions of the image; empty if there are none."""
    image: Tensor
    """uint8 `[3, side, side]`."""


class GeneratedCaptions(NamedTuple):
    """Generated captions of some images."""

    keys: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    generated: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Percentage of exact matches, number of images, and the first captions."""
        rows = list(zip(self.keys, self.generated, self.references, strict=True))
        return {
            "caption_exact": exact_match_percent(self.generated, self.references),
            "caption_samples": len(self.references),
            "examples": [
                {"key": key, "generated": generated, "references": list(references)}
                for key, generated, references in rows[:MAX_EXAMPLES]
            ],
        }


def caption_inputs(batch: Batch) -> list[CaptionInput]:
    """The images of a batch, and all their captions as references."""
    # Cloned: a view would keep the tensor of the whole batch in memory.
    return [
        CaptionInput(key, captions, image.clone())
        for key, captions, image in zip(batch.keys, batch.all_captions, batch.images, strict=True)
    ]


def caption_images(
    model: VisionLanguageModel,
    inputs: Sequence[CaptionInput],
    *,
    tokenizer: Tokenizer,
    context_length: int,
    device: torch.device,
    on_progress: Callable[[int], object] = lambda count: None,
) -> GeneratedCaptions:
    """Generate a caption for each image.

    Args:
        model: In evaluation mode, on `device`.
        inputs: The images.
        tokenizer: The run's tokenizer.
        context_length: Maximum tokens of a caption, including start and end tokens.
        device: Device of the model.
        on_progress: Called with the number of images of each batch.
    """
    generated: list[str] = []
    for first in range(0, len(inputs), IMAGES_PER_FORWARD):
        images = torch.stack([item.image for item in inputs[first : first + IMAGES_PER_FORWARD]])
        ids = generate_captions(
            model,
            images.to(device),
            start_id=tokenizer.start_id,
            end_id=tokenizer.end_id,
            max_length=context_length,
        )
        generated += [tokenizer.decode(tokens) for tokens in ids]
        on_progress(len(ids))
    return GeneratedCaptions(
        tuple(item.key for item in inputs),
        tuple(item.references for item in inputs),
        tuple(generated),
    )
