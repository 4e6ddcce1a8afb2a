"""Small shards, a tokenizer and settings for tests of the data pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from data_pipeline.manifest import Manifest
from data_pipeline.tokenizer import train_tokenizer
from data_pipeline.writer import write_shards

WORDS = "red green blue small large round square cat dog tree house star boat moon apple".split()


def caption(number: int) -> str:
    """A caption that no other sample of a test has."""
    return f"a {WORDS[number % 15]} {WORDS[number // 15 % 15]} number {number}"


def picture(number: int, side: int = 12) -> bytes:
    """A PNG whose pixels depend on `number`."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return bytes(cv2.imencode(".png", pixels)[1])


def samples(count: int, first: int = 0) -> Iterator[dict[str, object]]:
    """Good WebDataset samples."""
    for number in range(first, first + count):
        yield {"__key__": f"{number:05d}", "png": picture(number), "txt": caption(number)}


def make_shards(folder: Path, count: int = 40, samples_per_shard: int = 7, first: int = 0) -> Manifest:
    """Write good samples as shards."""
    return write_shards(samples(count, first), folder, samples_per_shard=samples_per_shard)


def make_tokenizer(folder: Path) -> str:
    """Train a small tokenizer; its path."""
    path = folder / "tokenizer.model"
    train_tokenizer([caption(number) for number in range(225)], path, vocab_size=300)
    return str(path)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Some change to every picture, so that a wrong seed would show."""

    flip: bool = True
    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.33)
    affine_degrees: float = 0.0
    affine_translate: float = 0.0
    affine_scale: tuple[float, float] = (1.0, 1.0)
    random_background: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `loader.DataSettings` asks for."""

    caption_keys: tuple[str, ...] = ("txt",)
    caption_weights: tuple[float, ...] = (1.0,)
    augment: Augment = field(default_factory=Augment)
    shuffle_window: int = 2
    workers: int = 0
    prefetch: int = 2
    cache_dir: str = ""
    verify_shards: bool = True
    timeout_seconds: float = 60.0
