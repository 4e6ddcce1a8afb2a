"""Other loaders, each as an endless stream of batches that hold what ours hold.

They get our decoder, transform and tokenizer as mapped functions, so that what differs is the way
from a file to a sample and from samples to a batch. Whatever only ours does (a generator named
after each sample, caption hashes) they are spared.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from data_pipeline.content.captions import clean
from data_pipeline.content.tokenizer import Tokenizer
from tools.bench_loader.decoding import Decoder
from tools.bench_loader.workloads import SEED, TEXT_LENGTH, DataSet, Workload

SHUFFLE_BUFFER = 1000
"""Samples among which webdataset draws where it shuffles."""


class AnyBatch(Protocol):
    """The part of a batch that every loader has, ours too."""

    @property
    def images(self) -> torch.Tensor:
        """uint8 `[B, 3, size, size]`."""

    @property
    def text_ids(self) -> torch.Tensor:
        """int64 `[B, S]`, zeros at the end."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the samples."""


class PeerBatch(NamedTuple):
    """A batch of a peer; see `AnyBatch`."""

    images: torch.Tensor
    text_ids: torch.Tensor
    keys: tuple[str, ...]


PASSES = 64
"""How often an epoch of a peer holds each sample where it is timed: what an epoch costs to begin is
not counted, as real ones are long."""


class Missing(Exception):
    """A peer cannot be used here; says why."""


def webdataset(
    data: DataSet, workload: Workload, *, shuffle: bool, passes: int = PASSES
) -> Iterator[PeerBatch]:
    """webdataset, the files decoded by our functions."""
    return iter(webdataset_pipeline(data, workload, shuffle=shuffle, passes=passes))


def webdataset_pipeline(
    data: DataSet, workload: Workload, *, shuffle: bool, passes: int = PASSES
) -> Any:
    """The pipeline of `webdataset`, for a DataLoader."""
    image, text = Decoder(workload), _Text(data)
    return (
        _shards(data, shuffle=shuffle, passes=passes)
        .to_tuple("__key__", "jpg", "txt")
        .map_tuple(_same, image, text)
        .batched(workload.batch, partial=False, collation_fn=_collate)
    )


def webdataset_with_pillow(
    data: DataSet, workload: Workload, *, passes: int = PASSES
) -> Iterator[PeerBatch]:
    """webdataset with its own decoder (`decode("pil")`) and Pillow's resize; not shuffled."""
    return iter(pillow_pipeline(data, workload, passes=passes))


def pillow_pipeline(data: DataSet, workload: Workload, *, passes: int = PASSES) -> Any:
    """The pipeline of `webdataset_with_pillow`, for a DataLoader."""
    image, text = _PillowImage(workload), _Text(data)
    pipeline = (
        _shards(data, shuffle=False, passes=passes).decode("pil").to_tuple("__key__", "jpg", "txt")
    )
    return pipeline.map_tuple(_same, image, text).batched(
        workload.batch, partial=False, collation_fn=_collate
    )


def _shards(data: DataSet, *, shuffle: bool, passes: int) -> Any:
    wds = importlib.import_module("webdataset")
    shards = data.shards() * passes
    pipeline = wds.WebDataset(
        shards, shardshuffle=len(shards) if shuffle else False, seed=SEED
    ).repeat()
    return pipeline.shuffle(SHUFFLE_BUFFER, seed=SEED) if shuffle else pipeline


def raw_webdataset(data: DataSet) -> Iterator[dict[str, Any]]:
    """webdataset's samples as they lie in the shards, once."""
    wds = importlib.import_module("webdataset")
    return iter(wds.WebDataset(data.shards(), shardshuffle=False))


def mosaicml(data: DataSet, workload: Workload, *, passes: int = PASSES) -> Iterator[PeerBatch]:
    """mosaicml-streaming with its default shuffle, from shards in its own format.

    Raises:
        Missing: It is not installed.
    """
    streaming = _import_streaming()
    image, text = Decoder(workload), _Text(data)

    class Decoded(streaming.StreamingDataset):  # type: ignore[name-defined]
        def __getitem__(self, at: int) -> tuple[str, np.ndarray, list[int]]:
            sample = super().__getitem__(at)
            return sample["key"], image(sample["jpg"]), text(sample["txt"])

    dataset = Decoded(
        local=str(_mds(streaming, data)),
        batch_size=workload.batch,
        shuffle=True,
        shuffle_seed=SEED,
        epoch_size=passes * workload.samples,
    )
    loader: Any = torch.utils.data.DataLoader(
        dataset, batch_size=workload.batch, collate_fn=_collate, drop_last=True
    )
    return _endless(loader)


def _endless(loader: Any) -> Iterator[PeerBatch]:
    while True:
        yield from loader


def _mds(streaming: Any, data: DataSet) -> Path:
    """The same samples in its own format."""
    folder = data.folder.with_name("mds")
    if not (folder / "index.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        columns = {"key": "str", "jpg": "bytes", "txt": "bytes"}
        with streaming.MDSWriter(out=str(folder), columns=columns) as writer:
            for sample in raw_webdataset(data):
                writer.write({"key": sample["__key__"], "jpg": sample["jpg"], "txt": sample["txt"]})
    return folder


def _import_streaming() -> Any:
    # Its package imports these for data sets and types that are not used here, and cannot do
    # without.
    for module, name in (
        ("torchvision.datasets", "VisionDataset"),
        ("torchvision.transforms.functional", "to_tensor"),
        ("transformers.feature_extraction_utils", "BatchFeature"),
        ("transformers.tokenization_utils_base", "BatchEncoding"),
        ("transformers.models.auto.tokenization_auto", "AutoTokenizer"),
    ):
        _stand_in(module, name)
    try:
        return importlib.import_module("streaming")
    except ImportError as error:
        raise Missing(
            f"mosaicml-streaming is not installed ({error}); see docs/benchmarks.md"
        ) from error


def _stand_in(module: str, name: str) -> None:
    """An empty class `module.name`, unless the module is there."""
    root = module.partition(".")[0]
    known = sys.modules.get(root)
    if known is None and importlib.util.find_spec(root) is not None:
        return
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        path = ".".join(parts[:count])
        if path not in sys.modules:
            made = types.ModuleType(path)
            made.__path__ = []
            sys.modules[path] = made
            if count > 1:
                setattr(sys.modules[".".join(parts[: count - 1])], parts[count - 1], made)
    setattr(sys.modules[module], name, type(name, (), {}))


class _PillowImage:
    """What webdataset decoded, made small and square as torchvision does it (Resize, CenterCrop,
    PILToTensor)."""

    def __init__(self, workload: Workload) -> None:
        self._size = workload.image_size

    def __call__(self, image: Image.Image) -> np.ndarray:
        size, short = self._size, min(image.size)
        image = image.resize(
            (round(image.width * size / short), round(image.height * size / short)),
            Image.Resampling.BILINEAR,
        )
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return np.ascontiguousarray(
            np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)
        )


class _Text:
    """A caption's file to ids."""

    def __init__(self, data: DataSet) -> None:
        self._encode = Tokenizer.load(data.tokenizer).encode

    def __call__(self, data: bytes | str) -> list[int]:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return self._encode(clean(text), TEXT_LENGTH)


def _same(value: Any) -> Any:
    return value


def _collate(items: list[tuple[str, np.ndarray, list[int]]]) -> PeerBatch:
    """Stack pictures and fill up captions, as cheaply as it can be done in a few lines."""
    keys, images, ids = zip(*items, strict=True)
    width = -(-max(map(len, ids)) // 8) * 8
    text_BS = np.zeros((len(ids), width), np.int64)
    for row, line in enumerate(ids):
        text_BS[row, : len(line)] = line
    return PeerBatch(torch.from_numpy(np.stack(images)), torch.from_numpy(text_BS), keys)
