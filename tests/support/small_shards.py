"""Small shards, a tokenizer and settings for tests of the data pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_pipeline.content.tokenizer import train_tokenizer
from data_pipeline.settings import AugmentConfig, DataConfig
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import write_shards

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


def make_shards(
    folder: Path, count: int = 40, samples_per_shard: int = 7, first: int = 0
) -> Manifest:
    """Write good samples as shards."""
    return write_shards(samples(count, first), folder, samples_per_shard=samples_per_shard)


def make_tokenizer(folder: Path) -> str:
    """Train a small tokenizer; its path."""
    path = folder / "tokenizer.model"
    train_tokenizer([caption(number) for number in range(225)], path, vocab_size=300)
    return str(path)


def settings(**changes: Any) -> DataConfig:
    """Settings of a loader in this process, with some change to every picture, so that a wrong seed
    would show."""
    given: dict[str, Any] = {
        "augment": AugmentConfig(flip=True, crop_scale=(0.5, 1.0), crop_ratio=(0.75, 1.33)),
        "shuffle_window": 2,
        "workers": 0,
        "prefetch": 2,
        "shard_seconds": 30.0,
        "timeout_seconds": 60.0,
    }
    return DataConfig(**given | changes)
