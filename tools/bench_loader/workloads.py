"""Data sets of the loader benchmarks, generated once per folder and then reused."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipeline.preparing.tokenizer_training import train_tokenizer
from data_pipeline.settings import AugmentConfig, DataConfig
from data_pipeline.shards.manifest import Manifest, load_manifest
from data_pipeline.shards.writer import write_shards
from tools.bench_loader.synthetic_images import caption, samples

VERSION = 1
"""Increment when the same settings produce different images; existing folders are rewritten."""
CONTEXT_LENGTH, VOCAB_SIZE, SEED = 32, 512, 0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Images of one kind, and how they are loaded."""

    name: str
    description: str
    """File contents and model input, for tables."""
    sizes: tuple[tuple[int, int], ...]
    """Width and height of the images, used in turn."""
    quality: int
    """JPEG quality."""
    grain: float
    """See `synthetic_images.pixels`."""
    image_size: int
    """Side of the square model input, pixels."""
    samples: int
    """Distinct samples."""
    shards: int = 4
    batch: int = 64
    """Pairs per batch."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def quick(self) -> Workload:
        """The same workload with minimal data, to test that a benchmark runs."""
        return replace(self, samples=48, shards=3, batch=8)

    @property
    def augments(self) -> bool:
        """Whether augmentation is random: two loaders then produce different pixels."""
        return self.augment != AugmentConfig()

    def settings(self, **changes: Any) -> DataConfig:
        """The loader's settings: all shards shuffled, no worker processes, with `changes`."""
        settings: dict[str, Any] = {"augment": self.augment, "workers": 0}
        return DataConfig(**settings | changes)


SMALL = Workload(
    name="small",
    description="64-96 px, 3 KB -> 64 px",
    sizes=((64, 64), (80, 80), (96, 96)),
    quality=85,
    grain=2.0,
    image_size=64,
    samples=4096,
)
WEB = Workload(
    name="web",
    description="256 px, 20 KB -> 224 px",
    sizes=((256, 256),),
    quality=90,
    grain=4.0,
    image_size=224,
    samples=2048,
)
PHOTO = Workload(
    name="photo",
    description="640x480, 75 KB -> 224 px",
    sizes=((640, 480), (480, 640)),
    quality=90,
    grain=4.0,
    image_size=224,
    samples=512,
)
CROPPED = replace(
    WEB,
    name="web-augmented",
    description="256 px, 20 KB -> random crop and flip -> 224 px",
    augment=AugmentConfig(flip=True, crop_scale=(0.35, 1.0)),
)
WORKLOADS = (SMALL, WEB, PHOTO, CROPPED)


@dataclass(frozen=True, kw_only=True)
class BenchmarkData:
    """Files of a workload."""

    folder: Path
    """Folder of the shards."""
    tokenizer: Path

    def manifest(self) -> Manifest:
        """Load the manifest of the shards."""
        return load_manifest(str(self.folder))

    def shards(self) -> list[str]:
        """Paths of the tar files, for readers without manifests."""
        return [str(path) for path in sorted(self.folder.glob("*.tar"))]


def prepare(workload: Workload, root: Path) -> BenchmarkData:
    """Return the files of a workload below `root`; write them if missing or outdated."""
    contents = json.dumps(
        {
            "version": VERSION,
            "sizes": workload.sizes,
            "quality": workload.quality,
            "grain": workload.grain,
            "samples": workload.samples,
            "shards": workload.shards,
        }
    )
    # Workloads that differ only in how images are loaded use the same files.
    width, height = workload.sizes[0]
    folder = root / f"{width}x{height}-{workload.samples}"
    stamp = folder / "stamp.json"
    if not stamp.exists() or stamp.read_text() != contents:
        shutil.rmtree(folder, ignore_errors=True)
        write_shards(
            samples(
                workload.samples, workload.sizes, quality=workload.quality, grain=workload.grain
            ),
            folder / "shards",
            samples_per_shard=-(-workload.samples // workload.shards),
        )
        captions = map(caption, range(2000))
        train_tokenizer(captions, folder / "tokenizer.model", vocab_size=VOCAB_SIZE)
        stamp.write_text(contents)
    return BenchmarkData(folder=folder / "shards", tokenizer=folder / "tokenizer.model")
