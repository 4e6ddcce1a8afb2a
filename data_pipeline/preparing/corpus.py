"""All captions of shards, one after the other: what a tokenizer learns from, and is judged by."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.common.errors import DataError
from data_pipeline.common.harmless import harmless
from data_pipeline.content.captions import check_key
from data_pipeline.preparing.captions import all_captions
from data_pipeline.preparing.visit import ShardTask, Unread, Visits, draw, opened
from data_pipeline.shards.manifest import Manifest

logger = logging.getLogger(__name__)

_NAMED_PROBLEMS = 10
"""Damaged samples that are named one by one; the rest are counted."""


def captions_of(
    manifests: Sequence[Manifest],
    keys: Sequence[str],
    *,
    samples: int = 0,
    seed: int = 0,
    workers: int = 0,
) -> Iterator[str]:
    """Every caption of every sample, clean, in the order of the shards.

    Damaged samples are left out, named and counted in the log.

    Args:
        manifests: The shards.
        keys: Where captions are: `txt`, or `json:FIELD`.
        samples: So many samples drawn at random; 0 takes all.
        seed: Of the draw.
        workers: Processes; the order of the captions is the same with any number.

    Raises:
        DataError: A shard or its index is missing or cannot be had.
        ConfigError: A key is no caption key.
    """
    for key in keys:
        check_key(key)
    problems, total = 0, 0
    tasks = draw(manifests, samples, seed)
    for task, result in Visits(label="reading captions", workers=workers).each(
        tasks, _Captions(tuple(keys))
    ):
        if isinstance(result, Unread):
            raise DataError(
                f"shard {task.entry.name} cannot be had ({result.reason}): {result.detail}"
            )
        found = json.loads(result)
        total += task.num_samples
        for key, slug, detail in found["bad"]:
            problems += 1
            if problems <= _NAMED_PROBLEMS:
                logger.warning(
                    "left out %s of %s: %s: %s",
                    harmless(key),
                    task.entry.name,
                    slug,
                    harmless(detail),
                )
        yield from found["captions"]
    if problems:
        logger.warning("%d of %d samples were damaged and left out", problems, total)


@dataclass(frozen=True)
class _Captions:
    """Reads the captions of one shard; its result is JSON."""

    keys: tuple[str, ...]

    def __call__(self, task: ShardTask) -> bytes:
        captions: list[str] = []
        bad: list[tuple[str, str, str]] = []
        with opened(task) as shard:
            for number, raw in shard.samples():
                try:
                    if isinstance(raw, DataError):
                        raise raw
                    captions += [
                        caption for found in all_captions(raw, self.keys) for caption in found
                    ]
                except DataError as error:
                    bad.append((shard.index.key(number), error.slug, str(error)))
        return json.dumps({"captions": captions, "bad": bad}).encode()
