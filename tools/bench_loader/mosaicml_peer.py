"""mosaicml-streaming as a baseline, from shards in its own format."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools.bench_loader.decoding import Decoder
from tools.bench_loader.peers import (
    PASSES,
    CaptionEncoder,
    PeerBatch,
    Unavailable,
    collate,
    raw_webdataset,
)
from tools.bench_loader.workloads import SEED, BenchmarkData, Workload

STUBS = (
    ("torchvision.datasets", "VisionDataset"),
    ("torchvision.transforms.functional", "to_tensor"),
    ("transformers.feature_extraction_utils", "BatchFeature"),
    ("transformers.tokenization_utils_base", "BatchEncoding"),
    ("transformers.models.auto.tokenization_auto", "AutoTokenizer"),
)
"""Modules and names that the package imports at start but that this benchmark does not use."""


def mosaicml(
    data: BenchmarkData, workload: Workload, *, passes: int = PASSES
) -> Iterator[PeerBatch]:
    """Batches of mosaicml-streaming with its default shuffle.

    Raises:
        Unavailable: It is not installed.
    """
    streaming = _import_streaming()
    image, text = Decoder(workload), CaptionEncoder(data)

    class Decoded(streaming.StreamingDataset):  # type: ignore[name-defined]
        def __getitem__(self, index: int) -> tuple[str, np.ndarray, list[int]]:
            sample = super().__getitem__(index)
            return sample["key"], image(sample["jpg"]), text(sample["txt"])

    dataset = Decoded(
        local=str(_write_mds(streaming, data)),
        batch_size=workload.batch,
        shuffle=True,
        shuffle_seed=SEED,
        epoch_size=passes * workload.samples,
    )
    loader: Any = torch.utils.data.DataLoader(
        dataset, batch_size=workload.batch, collate_fn=collate, drop_last=True
    )
    return _repeat(loader)


def _repeat(loader: Any) -> Iterator[PeerBatch]:
    while True:
        yield from loader


def _write_mds(streaming: Any, data: BenchmarkData) -> Path:
    """Write the samples in mosaicml-streaming's format, unless they exist."""
    folder = data.folder.with_name("mds")
    if not (folder / "index.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        columns = {"key": "str", "jpg": "bytes", "txt": "bytes"}
        with streaming.MDSWriter(out=str(folder), columns=columns) as writer:
            for sample in raw_webdataset(data):
                writer.write({"key": sample["__key__"], "jpg": sample["jpg"], "txt": sample["txt"]})
    return folder


def _import_streaming() -> Any:
    for module, name in STUBS:
        _install_stub(module, name)
    try:
        return importlib.import_module("streaming")
    except ImportError as error:
        raise Unavailable(
            f"mosaicml-streaming is not installed ({error}); see docs/benchmarks.md"
        ) from error


def _install_stub(module: str, name: str) -> None:
    """Add an empty class `module.name` to `sys.modules`, unless the package is installed."""
    root = module.partition(".")[0]
    if sys.modules.get(root) is None and importlib.util.find_spec(root) is not None:
        return
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        path = ".".join(parts[:count])
        if path in sys.modules:
            continue
        stub = types.ModuleType(path)
        stub.__path__ = []
        sys.modules[path] = stub
        if count > 1:
            setattr(sys.modules[".".join(parts[: count - 1])], parts[count - 1], stub)
    setattr(sys.modules[module], name, type(name, (), {}))
