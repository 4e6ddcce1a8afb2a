"""Small shards, a tokenizer and settings for tests of the data pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_pipeline.preparing.tokenizer_training import train_tokenizer
from data_pipeline.settings import AugmentConfig, DataConfig
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import write_shards

WORDS = "red green blue small large round square cat dog tree house star boat moon apple".split()


def make_caption(index: int) -> str:
    """A caption that is unique to the sample."""
    return f"a {WORDS[index % 15]} {WORDS[index // 15 % 15]} number {index}"


def make_png(index: int, side: int = 12) -> bytes:
    """A PNG of random pixels, seeded by `index`."""
    pixels = np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return bytes(cv2.imencode(".png", pixels)[1])


def make_samples(count: int, first: int = 0) -> Iterator[dict[str, object]]:
    """Valid WebDataset samples."""
    for index in range(first, first + count):
        yield {"__key__": f"{index:05d}", "png": make_png(index), "txt": make_caption(index)}


def make_shards(
    folder: Path, count: int = 40, samples_per_shard: int = 7, first: int = 0
) -> Manifest:
    """Write valid samples as shards."""
    return write_shards(make_samples(count, first), folder, samples_per_shard=samples_per_shard)


def make_tokenizer(folder: Path) -> str:
    """Train a small tokenizer and return its path."""
    path = folder / "tokenizer.model"
    train_tokenizer([make_caption(index) for index in range(225)], path, vocab_size=300)
    return str(path)


def make_data_config(**changes: Any) -> DataConfig:
    """Settings of a loader without worker processes; augmentation is enabled, so that a wrong seed
    is detected."""
    defaults: dict[str, Any] = {
        "augment": AugmentConfig(flip=True, crop_scale=(0.5, 1.0), crop_ratio=(0.75, 1.33)),
        "shuffle_window": 2,
        "workers": 0,
        "prefetch": 2,
        "shard_seconds": 30.0,
        "timeout_seconds": 60.0,
    }
    return DataConfig(**defaults | changes)


def remove_indices(folder: Path) -> None:
    for file in [*folder.rglob("*.json"), *folder.rglob("*.index")]:
        file.unlink()
