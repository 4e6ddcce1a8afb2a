"""Small learnable datasets: images of one colored shape with captions that describe it.

    dataset = make_shape_dataset(tmp_path, pairs=64)
    dataset.folder, dataset.tokenizer, dataset.vocab_size

Deterministic: the same arguments give the same bytes.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from data_pipeline.common.seeds import rng
from data_pipeline.preparing.tokenizer_training import train_tokenizer
from data_pipeline.shards.writer import write_shards

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 180),
    "orange": (240, 140, 30),
    "black": (20, 20, 20),
    "grey": (140, 140, 140),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = {"small": 0.22, "large": 0.42}
VOCAB_SIZE = 288
"""Vocabulary size: 4 special tokens, 256 bytes, and pieces of the captions."""


@dataclass(frozen=True, kw_only=True)
class ShapeDataset:
    """A folder of shards with its tokenizer."""

    folder: Path
    """Contains the shards and `manifest.json`."""
    tokenizer: Path
    """SentencePiece model trained on `CAPTIONS`."""
    vocab_size: int
    """Vocabulary size; the required `model.vocab_size`."""
    captions: tuple[str, ...]
    """Caption of each sample in the order of the shards."""
    keys: tuple[str, ...]
    """Key of each sample in the order of the shards."""

    @property
    def overrides(self) -> list[str]:
        """Settings for training on this dataset."""
        return [
            f"data.train=[{self.folder}]",
            f"data.tokenizer={self.tokenizer}",
            f"model.vocab_size={self.vocab_size}",
        ]


CAPTIONS = tuple(
    f"a {size} {color} {shape}" for size, color, shape in itertools.product(SIZES, COLORS, SHAPES)
)
"""All 80 possible captions."""


def make_shape_dataset(
    folder: Path, *, pairs: int = 64, side: int = 48, samples_per_shard: int = 16
) -> ShapeDataset:
    """Write `pairs` images of `side` pixels to `folder/shards`, and a tokenizer to `folder`.

    Captions are in a fixed shuffled order and distinct up to 80 pairs; a repeated caption has
    another image, with the shape at another position.
    """
    order = rng("shapes", "captions").permutation(len(CAPTIONS))
    captions = [CAPTIONS[order[index % len(CAPTIONS)]] for index in range(pairs)]
    samples = list(_samples(captions, side))
    write_shards(samples, folder / "shards", samples_per_shard=samples_per_shard)
    train_tokenizer(CAPTIONS, folder / "tokenizer.model", vocab_size=VOCAB_SIZE)
    return ShapeDataset(
        folder=folder / "shards",
        tokenizer=folder / "tokenizer.model",
        vocab_size=VOCAB_SIZE,
        captions=tuple(captions),
        keys=tuple(str(sample["__key__"]) for sample in samples),
    )


def _samples(captions: list[str], side: int) -> Iterator[dict[str, object]]:
    for index, caption in enumerate(captions):
        yield {
            "__key__": f"{index:06d}",
            "png": render_shape_png(caption, side, seed=index),
            "txt": caption,
        }


def render_shape_png(caption: str, side: int, *, seed: int = 0) -> bytes:
    """PNG of the image that `caption` (one of `CAPTIONS`) describes; `seed` gives the position."""
    _, size, color, shape = caption.split()
    radius = SIZES[size] * side
    margin = side / 2 - radius
    x, y = side / 2 + rng("shapes", "place", seed).uniform(-margin, margin, size=2)
    image = Image.new("RGB", (side, side), "white")
    _draw(ImageDraw.Draw(image), shape, COLORS[color], float(x), float(y), radius)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _draw(
    draw: ImageDraw.ImageDraw,
    shape: str,
    color: tuple[int, int, int],
    x: float,
    y: float,
    radius: float,
) -> None:
    box, thickness = (x - radius, y - radius, x + radius, y + radius), radius / 3
    match shape:
        case "circle":
            draw.ellipse(box, fill=color)
        case "square":
            draw.rectangle(box, fill=color)
        case "triangle":
            draw.polygon(
                [(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=color
            )
        case "cross":
            draw.rectangle((x - thickness, y - radius, x + thickness, y + radius), fill=color)
            draw.rectangle((x - radius, y - thickness, x + radius, y + thickness), fill=color)
        case "ring":
            draw.ellipse(box, outline=color, width=max(1, round(thickness)))
        case _:
            raise ValueError(f"unknown shape {shape!r}; expected one of {SHAPES}")
