"""Hashes of every sample for deduplication: 32 bytes per sample, one result per shard."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.common.errors import DataError
from data_pipeline.common.processes import SINGLE_PART, Part
from data_pipeline.content.captions import first_caption, hash_caption
from data_pipeline.preparing.perceptual_hash import perceptual_hash
from data_pipeline.preparing.shard_access import ShardUnavailableError, read_samples
from data_pipeline.preparing.shard_map import ShardMap, UnavailableShard
from data_pipeline.preparing.tasks import ShardTask, shard_tasks
from data_pipeline.sample_keys import DEFAULT_KEYS, SampleKeys, image_bytes
from data_pipeline.samples import RawSample
from data_pipeline.shards.manifest import Manifest

READABLE, HAS_PERCEPTUAL, HAS_CAPTION = 1, 2, 4
"""Flags: the image can be decoded; it has a perceptual hash; the sample has a caption."""


@dataclass(frozen=True, kw_only=True)
class Hashes:
    """One row per sample, in the order of the shards."""

    dataset: np.ndarray
    shard: np.ndarray
    sample: np.ndarray
    """int64 `[n]`: indices that locate the sample."""
    file: np.ndarray
    """uint64 `[n]`: hash of the image file."""
    perceptual: np.ndarray
    """uint64 `[n]`: perceptual hash of the image."""
    caption: np.ndarray
    """uint64 `[n]`: hash of the caption, ignoring case and whitespace."""
    flags: np.ndarray
    """uint64 `[n]`: bitwise OR of the flags above."""
    unavailable: Sequence[UnavailableShard] = ()
    """Shards that could not be read; they have no rows."""

    def __len__(self) -> int:
        return len(self.flags)

    def has(self, flag: int) -> np.ndarray:
        """bool `[n]`: whether the flag is set."""
        is_set: np.ndarray = self.flags & np.uint64(flag) != 0
        return is_set


def hash_samples(
    manifests: Sequence[Manifest],
    *,
    keys: SampleKeys = DEFAULT_KEYS,
    workers: int = 0,
    part: Part = SINGLE_PART,
    work_dir: str = "",
) -> Hashes:
    """Hash every sample; unreadable samples have no flags.

    Args:
        manifests: The datasets.
        keys: Where images and captions are.
        workers: Number of processes.
        part: Part of the shards to process; see `shard_tasks`.
        work_dir: Folder of stored results; see `ShardMap`.

    Raises:
        DataError: A stored result is corrupt.
    """
    hasher = _Hasher(keys)
    shard_map = ShardMap(
        label="hashing", workers=workers, work_dir=work_dir, settings=repr(("hashes", 3, hasher))
    )

    blocks, unavailable = [np.empty((0, 7), np.uint64)], list[UnavailableShard]()
    for task, result in shard_map.run(shard_tasks(manifests, part), hasher):
        if isinstance(result, UnavailableShard):
            unavailable.append(result)
            continue

        hashes = np.frombuffer(result, "<u8").reshape(-1, 4)
        if len(hashes) != task.num_samples:
            raise DataError(
                f"the stored result for {task.entry.name} in {work_dir} is corrupt; delete it, or "
                f"use another --work-dir"
            )
        location = np.empty((len(hashes), 3), np.uint64)
        location[:] = (task.dataset, task.shard, 0)
        location[:, 2] = np.arange(len(hashes))
        blocks.append(np.hstack([location, hashes]))

    columns = np.concatenate(blocks).T
    dataset, shard, sample = (column.astype(np.int64) for column in columns[:3])
    return Hashes(
        dataset=dataset,
        shard=shard,
        sample=sample,
        file=columns[3].copy(),
        perceptual=columns[4].copy(),
        caption=columns[5].copy(),
        flags=columns[6].copy(),
        unavailable=unavailable,
    )


@dataclass(frozen=True)
class _Hasher:
    """Hashes one shard; the result is uint64 `[samples, 4]`: file, perceptual, caption, flags."""

    keys: SampleKeys

    def __call__(self, task: ShardTask) -> bytes:
        hashes = np.zeros((task.num_samples, 4), "<u8")
        try:
            for row, (_, raw) in enumerate(read_samples(task)):
                if isinstance(raw, RawSample):
                    hashes[row] = self._hash(raw)
        except ShardUnavailableError:
            raise
        except DataError:
            pass  # the index is corrupt: all samples count as unreadable
        return hashes.tobytes()

    def _hash(self, raw: RawSample) -> tuple[int, int, int, int]:
        try:
            data = image_bytes(raw, self.keys.images)
            perceptual = perceptual_hash(data)
        except DataError:
            return 0, 0, 0, 0

        try:
            caption = first_caption(raw.members, self.keys.captions)
        except DataError:
            caption = None

        flags = READABLE
        flags |= HAS_PERCEPTUAL if perceptual is not None else 0
        flags |= HAS_CAPTION if caption else 0
        file = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        return file, perceptual or 0, hash_caption(caption) if caption else 0, flags
