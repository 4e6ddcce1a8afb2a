"""What dedup compares: 32 bytes a sample, made once a shard."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.common.errors import DataError
from data_pipeline.common.processes import WHOLE, Part
from data_pipeline.content.captions import caption_hash
from data_pipeline.content.recipe import picture_of
from data_pipeline.preparing.captions import first_caption
from data_pipeline.preparing.phash import perceptual_hash
from data_pipeline.preparing.visit import ShardTask, Unread, UnreadError, Visits, opened, tasks_of
from data_pipeline.samples import RawSample
from data_pipeline.shards.manifest import Manifest

READABLE, HAS_LOOKS, HAS_CAPTION = 1, 2, 4
"""Flags: the picture could be decoded; it has a perceptual hash; there is a caption."""


@dataclass(frozen=True, kw_only=True)
class Hashes:
    """One row a sample, shards in order."""

    dataset: np.ndarray
    shard: np.ndarray
    sample: np.ndarray
    """int64 `[n]`: where the sample is."""
    contents: np.ndarray
    """uint64 `[n]`, of the picture's file."""
    looks: np.ndarray
    """uint64 `[n]`, the perceptual hash."""
    caption: np.ndarray
    """uint64 `[n]`, of the caption without regard to capitals and blanks."""
    flags: np.ndarray
    """uint64 `[n]`."""
    unread: Sequence[Unread] = ()
    """Shards that could not be had, of which there are no rows."""

    def __len__(self) -> int:
        return len(self.flags)

    def has(self, flag: int) -> np.ndarray:
        """bool `[n]`."""
        found: np.ndarray = self.flags & np.uint64(flag) != 0
        return found


def hash_samples(
    manifests: Sequence[Manifest],
    *,
    caption_keys: Sequence[str] = ("txt",),
    workers: int = 0,
    part: Part = WHOLE,
    work: str = "",
) -> Hashes:
    """The hashes of every sample; unreadable ones have no flags.

    Args:
        manifests: The datasets.
        caption_keys: Where the caption is; the first that there is.
        workers: Processes.
        part: Share of the shards.
        work: Where results are kept.
    """
    hasher = _Hasher(tuple(caption_keys))
    visits = Visits(
        label="hashing", workers=workers, work=work, settings=repr(("hashes", 2, hasher))
    )
    rows, unread = [np.empty((0, 7), np.uint64)], list[Unread]()
    for task, result in visits.each(tasks_of(manifests, part), hasher):
        if isinstance(result, Unread):
            unread.append(result)
            continue
        table = np.frombuffer(result, "<u8").reshape(-1, 4)
        if len(table) != task.num_samples:
            raise DataError(
                f"a result of {task.entry.name} in {work} is damaged; remove it, or take another --work"
            )
        where = np.empty((len(table), 3), np.uint64)
        where[:] = (task.dataset, task.shard, 0)
        where[:, 2] = np.arange(len(table))
        rows.append(np.hstack([where, table]))
    columns = np.concatenate(rows).T
    dataset, shard, sample = (column.astype(np.int64) for column in columns[:3])
    return Hashes(
        dataset=dataset,
        shard=shard,
        sample=sample,
        contents=columns[3].copy(),
        looks=columns[4].copy(),
        caption=columns[5].copy(),
        flags=columns[6].copy(),
        unread=unread,
    )


@dataclass(frozen=True)
class _Hasher:
    """Hashes one shard; its result is uint64 `[samples, 4]`: contents, looks, caption, flags."""

    caption_keys: tuple[str, ...]

    def __call__(self, task: ShardTask) -> bytes:
        table = np.zeros((task.num_samples, 4), "<u8")
        try:
            with opened(task) as shard:
                for row, (_, raw) in enumerate(shard.samples()):
                    if isinstance(raw, RawSample):
                        table[row] = self._row(raw)
        except UnreadError:
            raise
        except DataError:
            pass  # a damaged index: none of its samples can be compared
        return table.tobytes()

    def _row(self, raw: RawSample) -> tuple[int, int, int, int]:
        try:
            data = picture_of(raw)
            looks = perceptual_hash(data)
        except DataError:
            return 0, 0, 0, 0
        contents = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        flags = READABLE | (HAS_LOOKS if looks is not None else 0)
        try:
            caption = first_caption(raw, self.caption_keys)
        except DataError:
            caption = None
        return (
            contents,
            looks or 0,
            caption_hash(caption) if caption else 0,
            flags | (HAS_CAPTION if caption else 0),
        )
