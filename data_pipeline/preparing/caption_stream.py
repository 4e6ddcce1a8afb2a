"""Iterates over the captions of datasets, to train or evaluate a tokenizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from data_pipeline.common.errors import DataError
from data_pipeline.common.escaping import escape_control
from data_pipeline.common.tables import counted
from data_pipeline.content.captions import all_captions, check_caption_key
from data_pipeline.preparing.shard_access import read_samples
from data_pipeline.preparing.shard_map import ShardMap, UnavailableShard
from data_pipeline.preparing.tasks import ShardTask, sample_tasks
from data_pipeline.samples import SampleProblem
from data_pipeline.shards.manifest import Manifest

logger = logging.getLogger(__name__)

_MAX_LOGGED = 10
"""Corrupt samples that are logged individually; the rest are only counted."""


def iter_captions(
    manifests: Sequence[Manifest],
    keys: Sequence[str],
    *,
    samples: int = 0,
    seed: int = 0,
    workers: int = 0,
) -> Iterator[str]:
    """Every caption of every sample, cleaned, in the order of the shards.

    Corrupt samples are skipped, logged and counted; samples without a caption are counted.

    Args:
        manifests: The datasets.
        keys: Where to find captions: `txt`, or `json:FIELD`.
        samples: Number of random samples; 0 uses all.
        seed: Random seed for choosing samples.
        workers: Number of processes; does not change the order of the captions.

    Raises:
        DataError: A shard or its index is missing or unavailable.
        ConfigError: A key is not a caption key.
    """
    for key in keys:
        check_caption_key(key)

    num_corrupt, num_without, total = 0, 0, 0
    shard_map = ShardMap(label="reading captions", workers=workers)
    for task, result in shard_map.run(sample_tasks(manifests, samples, seed), _Reader(tuple(keys))):
        if isinstance(result, UnavailableShard):
            raise DataError(
                f"shard {task.entry.name} is unavailable ({result.reason}): {result.detail}"
            )

        content = json.loads(result)
        total += task.num_samples
        num_without += content["without_caption"]
        for key, slug, detail in content["corrupt"]:
            num_corrupt += 1
            if num_corrupt <= _MAX_LOGGED:
                _log_corrupt(task, key, slug, detail)
        yield from content["captions"]

    if num_corrupt:
        logger.warning("skipped %s of %d", counted(num_corrupt, "corrupt sample"), total)
    if num_without:
        names = " or ".join(keys)
        logger.warning("%d samples of %d have no caption in %s", num_without, total, names)


def _log_corrupt(task: ShardTask, key: str, slug: str, detail: str) -> None:
    key, detail = escape_control(key), escape_control(detail)
    logger.warning("skipped sample %s of %s: %s: %s", key, task.entry.name, slug, detail)


@dataclass(frozen=True)
class _Reader:
    """Reads the captions of one shard; the result is JSON."""

    keys: tuple[str, ...]

    def __call__(self, task: ShardTask) -> bytes:
        captions: list[str] = []
        without_caption = 0
        corrupt: list[tuple[str, str, str]] = []
        for _, raw in read_samples(task):
            if isinstance(raw, SampleProblem):
                corrupt.append((raw.key, raw.reason, raw.detail))
                continue
            try:
                found = list(chain.from_iterable(all_captions(raw.members, self.keys)))
            except DataError as error:
                corrupt.append((raw.key, error.slug, str(error)))
                continue
            captions += found
            without_caption += not found

        content = {"captions": captions, "corrupt": corrupt, "without_caption": without_caption}
        return json.dumps(content).encode()
