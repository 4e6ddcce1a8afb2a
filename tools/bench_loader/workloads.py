"""The kinds of data that are measured, written once into a folder and found again there."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipeline.content.tokenizer import train_tokenizer
from data_pipeline.settings import AugmentConfig, DataConfig
from data_pipeline.shards.manifest import Manifest, load_manifest
from data_pipeline.shards.writer import write_shards
from tools.bench_loader.pictures import caption, samples

VERSION = 1
"""Counted up when the same settings give other pictures: older folders are then written again."""
TEXT_LENGTH, VOCAB_SIZE, SEED = 32, 512, 0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One kind of pictures, and what is made of them."""

    name: str
    what: str
    """For the table: what stands in the files, and what the model gets."""
    sides: tuple[tuple[int, int], ...]
    """Width and height of the pictures, which take turns."""
    quality: int
    """Of the JPEG files."""
    grain: float
    """See `pictures.pixels`."""
    image_size: int
    """Side of the square that a batch holds."""
    samples: int
    """Different samples."""
    shards: int = 4
    batch: int = 64
    """Pairs of a batch."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def quick(self) -> Workload:
        """The same with hardly any samples, to try the machinery."""
        return replace(self, samples=48, shards=3, batch=8)

    @property
    def augments(self) -> bool:
        """Whether anything is drawn: then two loaders make different pictures of a sample."""
        return self.augment != AugmentConfig()

    def settings(self, **changes: Any) -> DataConfig:
        """The loader's settings: all shards shuffled together, in this process unless told
        otherwise."""
        given: dict[str, Any] = {"augment": self.augment, "workers": 0}
        return DataConfig(**given | changes)


SMALL = Workload(
    name="small",
    what="64-96 px, 3 KB -> 64 px",
    sides=((64, 64), (80, 80), (96, 96)),
    quality=85,
    grain=2.0,
    image_size=64,
    samples=4096,
)
WEB = Workload(
    name="web",
    what="256 px, 20 KB -> 224 px",
    sides=((256, 256),),
    quality=90,
    grain=4.0,
    image_size=224,
    samples=2048,
)
PHOTO = Workload(
    name="photo",
    what="640x480, 75 KB -> 224 px",
    sides=((640, 480), (480, 640)),
    quality=90,
    grain=4.0,
    image_size=224,
    samples=512,
)
CROPPED = replace(
    WEB,
    name="web-augmented",
    what="256 px, 20 KB -> random crop and flip -> 224 px",
    augment=AugmentConfig(flip=True, crop_scale=(0.35, 1.0)),
)
WORKLOADS = (SMALL, WEB, PHOTO, CROPPED)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A workload's files."""

    folder: Path
    """Of the shards."""
    tokenizer: Path

    def manifest(self) -> Manifest:
        """Of the shards."""
        return load_manifest(str(self.folder))

    def shards(self) -> list[str]:
        """Paths of the archives, for readers that know no manifest."""
        return [str(path) for path in sorted(self.folder.glob("*.tar"))]


def prepare(workload: Workload, root: Path) -> DataSet:
    """The files of a workload below `root`; written if they are not there as asked for."""
    settings = {
        "version": VERSION,
        "sides": workload.sides,
        "quality": workload.quality,
        "grain": workload.grain,
        "samples": workload.samples,
        "shards": workload.shards,
    }
    wanted = json.dumps(settings)
    # Workloads that differ only in what is made of the pictures share them.
    folder = root / f"{workload.sides[0][0]}x{workload.sides[0][1]}-{workload.samples}"
    stamp = folder / "stamp.json"
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        write_shards(
            samples(
                workload.samples, workload.sides, quality=workload.quality, grain=workload.grain
            ),
            folder / "shards",
            samples_per_shard=-(-workload.samples // workload.shards),
        )
        train_tokenizer(
            map(caption, range(2000)), folder / "tokenizer.model", vocab_size=VOCAB_SIZE
        )
        stamp.write_text(wanted)
    return DataSet(folder=folder / "shards", tokenizer=folder / "tokenizer.model")
