"""Small sets of shards that a model can learn: one colored shape a picture, and a caption that
says so.

    shapes = make_shapes(tmp_path, pairs=64)
    shapes.folder, shapes.tokenizer, shapes.vocab_size

The same arguments give the same bytes.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from data_pipeline.common.seeds import rng
from data_pipeline.content.tokenizer import train_tokenizer
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
"""Ids of the tokenizer: 4 marks, 256 bytes, and the letters and pieces of the captions."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A folder of shards with its tokenizer."""

    folder: Path
    """Holds the shards and `manifest.json`."""
    tokenizer: Path
    """SentencePiece model trained on `CAPTIONS`."""
    vocab_size: int
    """Ids of the tokenizer; what `model.vocab_size` must be."""
    captions: tuple[str, ...]
    """Caption of each sample in the order of the shards."""
    keys: tuple[str, ...]
    """Key of each sample in the order of the shards."""

    @property
    def overrides(self) -> list[str]:
        """Settings that make a run train on these shards."""
        return [
            f"data.train=[{self.folder}]",
            f"data.tokenizer={self.tokenizer}",
            f"model.vocab_size={self.vocab_size}",
        ]


CAPTIONS = tuple(
    f"a {size} {color} {shape}" for size, color, shape in itertools.product(SIZES, COLORS, SHAPES)
)
"""Every caption there is: 80."""


def make_shapes(
    folder: Path, *, pairs: int = 64, side: int = 48, samples_per_shard: int = 16
) -> Shapes:
    """Write `pairs` pictures of `side` pixels below `folder/shards` and a tokenizer beside it.

    Captions come in a fixed mixed order and all differ up to 80 pairs; a caption that comes again
    has another picture (the shape lies elsewhere).
    """
    order = rng("shapes", "captions").permutation(len(CAPTIONS))
    captions = [CAPTIONS[order[index % len(CAPTIONS)]] for index in range(pairs)]
    samples = list(_samples(captions, side))
    write_shards(samples, folder / "shards", samples_per_shard=samples_per_shard)
    train_tokenizer(CAPTIONS, folder / "tokenizer.model", vocab_size=VOCAB_SIZE)
    return Shapes(
        folder=folder / "shards",
        tokenizer=folder / "tokenizer.model",
        vocab_size=VOCAB_SIZE,
        captions=tuple(captions),
        keys=tuple(str(sample["__key__"]) for sample in samples),
    )


def _samples(captions: list[str], side: int) -> Iterator[dict[str, object]]:
    for index, caption in enumerate(captions):
        yield {"__key__": f"{index:06d}", "png": picture(caption, side, seed=index), "txt": caption}


def picture(caption: str, side: int, *, seed: int = 0) -> bytes:
    """PNG bytes of the picture that `caption` (one of `CAPTIONS`) describes; `seed` moves the
    shape."""
    _, size, color, shape = caption.split()
    radius = SIZES[size] * side
    room = side / 2 - radius
    x, y = side / 2 + rng("shapes", "place", seed).uniform(-room, room, size=2)
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
    box, thick = (x - radius, y - radius, x + radius, y + radius), radius / 3
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
            draw.rectangle((x - thick, y - radius, x + thick, y + radius), fill=color)
            draw.rectangle((x - radius, y - thick, x + radius, y + thick), fill=color)
        case "ring":
            draw.ellipse(box, outline=color, width=max(1, round(thick)))
        case _:
            raise ValueError(f"there is no shape {shape!r}; known are {SHAPES}")
