"""webdataset pipelines as baselines: endless streams of batches with the loader's contents.

They use the loader's decoder, transform and tokenizer as mapped functions, so that only the path
from files to samples and from samples to batches differs. They skip work that only the loader does:
a random generator per sample and caption hashes.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from data_pipeline.content.captions import clean_caption
from data_pipeline.content.tokenizer import Tokenizer
from tools.bench_loader.decoding import Decoder
from tools.bench_loader.workloads import CONTEXT_LENGTH, SEED, BenchmarkData, Workload

SHUFFLE_BUFFER = 1000
"""Size of webdataset's shuffle buffer, samples."""
PASSES = 64
"""Passes over the data in one epoch of a timed peer, so that the cost of starting an epoch is
negligible, as in real training."""


class AnyBatch(Protocol):
    """The fields that batches of every loader have."""

    @property
    def images(self) -> torch.Tensor:
        """uint8 `[B, 3, size, size]`."""

    @property
    def text_ids(self) -> torch.Tensor:
        """int64 `[B, S]`, padded with zeros."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Sample keys."""


class PeerBatch(NamedTuple):
    """A batch of another loader; see `AnyBatch`."""

    images: torch.Tensor
    text_ids: torch.Tensor
    keys: tuple[str, ...]


class Unavailable(Exception):
    """A loader cannot be used on this machine; the message gives the reason."""


def webdataset(
    data: BenchmarkData, workload: Workload, *, shuffle: bool, passes: int = PASSES
) -> Iterator[PeerBatch]:
    """Batches of webdataset with the loader's decoder."""
    return iter(webdataset_pipeline(data, workload, shuffle=shuffle, passes=passes))


def webdataset_pipeline(
    data: BenchmarkData, workload: Workload, *, shuffle: bool, passes: int = PASSES
) -> Any:
    """The pipeline of `webdataset`, for a DataLoader."""
    image, text = Decoder(workload), CaptionEncoder(data)
    return (
        _open_shards(data, shuffle=shuffle, passes=passes)
        .to_tuple("__key__", "jpg", "txt")
        .map_tuple(_identity, image, text)
        .batched(workload.batch, partial=False, collation_fn=collate)
    )


def webdataset_with_pillow(
    data: BenchmarkData, workload: Workload, *, passes: int = PASSES
) -> Iterator[PeerBatch]:
    """Batches of webdataset with its decoder (`decode("pil")`) and Pillow's resize, unshuffled."""
    return iter(pillow_pipeline(data, workload, passes=passes))


def pillow_pipeline(data: BenchmarkData, workload: Workload, *, passes: int = PASSES) -> Any:
    """The pipeline of `webdataset_with_pillow`, for a DataLoader."""
    image, text = _PillowTransform(workload), CaptionEncoder(data)
    return (
        _open_shards(data, shuffle=False, passes=passes)
        .decode("pil")
        .to_tuple("__key__", "jpg", "txt")
        .map_tuple(_identity, image, text)
        .batched(workload.batch, partial=False, collation_fn=collate)
    )


def raw_webdataset(data: BenchmarkData) -> Iterator[dict[str, Any]]:
    """One pass over webdataset's undecoded samples."""
    wds = importlib.import_module("webdataset")
    return iter(wds.WebDataset(data.shards(), shardshuffle=False))


def collate(items: list[tuple[str, np.ndarray, list[int]]]) -> PeerBatch:
    """Stack images and pad captions to a multiple of 8 tokens."""
    keys, images, ids = zip(*items, strict=True)
    width = -(-max(map(len, ids)) // 8) * 8
    text_BS = np.zeros((len(ids), width), np.int64)
    for row, caption_ids in enumerate(ids):
        text_BS[row, : len(caption_ids)] = caption_ids
    return PeerBatch(torch.from_numpy(np.stack(images)), torch.from_numpy(text_BS), keys)


class CaptionEncoder:
    """Converts a caption file to token ids."""

    def __init__(self, data: BenchmarkData) -> None:
        self._encode = Tokenizer.load(data.tokenizer).encode

    def __call__(self, data: bytes | str) -> list[int]:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return self._encode(clean_caption(text), CONTEXT_LENGTH)


class _PillowTransform:
    """torchvision's Resize, CenterCrop and PILToTensor, without torchvision."""

    def __init__(self, workload: Workload) -> None:
        self._size = workload.image_size

    def __call__(self, image: Image.Image) -> np.ndarray:
        size, short_side = self._size, min(image.size)
        width = round(image.width * size / short_side)
        height = round(image.height * size / short_side)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        square = image.crop((left, top, left + size, top + size))
        return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _open_shards(data: BenchmarkData, *, shuffle: bool, passes: int) -> Any:
    wds = importlib.import_module("webdataset")
    shards = data.shards() * passes
    shard_shuffle = len(shards) if shuffle else False
    pipeline = wds.WebDataset(shards, shardshuffle=shard_shuffle, seed=SEED).repeat()
    return pipeline.shuffle(SHUFFLE_BUFFER, seed=SEED) if shuffle else pipeline


def _identity(value: Any) -> Any:
    return value
