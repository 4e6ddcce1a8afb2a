"""Finds the samples that training filters exclude.

Applies the same checks as training, in the same order, but does not decode images.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from data_pipeline.common.config import from_mapping
from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.processes import SINGLE_PART, Part
from data_pipeline.content.captions import SampleTexts, no_caption_error, select_caption
from data_pipeline.content.filters import (
    Condition,
    caption_length_allowed,
    caption_length_error,
    check_fields,
    check_image_size,
    parse_conditions,
)
from data_pipeline.content.image import check_pixels, read_header
from data_pipeline.preparing.shard_access import ShardUnavailableError, read_samples
from data_pipeline.preparing.shard_map import ShardMap, UnavailableShard
from data_pipeline.preparing.tasks import ShardTask, shard_tasks
from data_pipeline.sample_keys import DEFAULT_KEYS, SampleKeys, image_bytes
from data_pipeline.samples import RawSample, SampleProblem
from data_pipeline.settings import FilterConfig, LimitConfig
from data_pipeline.shards.manifest import Manifest


class FilterReport(NamedTuple):
    """Samples that the filters exclude."""

    samples: int
    """Number of samples that were read."""
    reasons: Counter[str]
    """Number of excluded samples by reason: `filter:...`, or the slug of a corruption."""
    examples: dict[str, str]
    """The first excluded sample for each reason, with details."""
    dropped: list[dict[int, list[int]]]
    """For each dataset, indices of the excluded samples by shard index."""
    unavailable: list[UnavailableShard]
    """Shards that could not be read; they are not counted."""


def filter_samples(
    manifests: Sequence[Manifest],
    filters: FilterConfig,
    *,
    keys: SampleKeys = DEFAULT_KEYS,
    limits: LimitConfig | None = None,
    workers: int = 0,
    part: Part = SINGLE_PART,
    work_dir: str = "",
) -> FilterReport:
    """Apply the filters to every sample.

    Args:
        manifests: The datasets.
        filters: Which samples to exclude.
        keys: Where images and captions are.
        limits: Resource limits of a sample; a sample beyond them counts as corrupt.
        workers: Number of processes.
        part: Part of the shards to process; see `shard_tasks`.
        work_dir: Folder of stored results; see `ShardMap`.

    Raises:
        ConfigError: A condition is invalid.
    """
    parse_conditions(filters.require)  # raise for an invalid condition before reading any shard
    shard_filter = _ShardFilter(filters, keys, limits or LimitConfig())
    shard_map = ShardMap(
        label="filtering",
        workers=workers,
        work_dir=work_dir,
        settings=repr(("filter", 3, shard_filter)),
    )

    report = FilterReport(0, Counter(), {}, [{} for _ in manifests], [])
    samples = 0
    for task, result in shard_map.run(shard_tasks(manifests, part), shard_filter):
        if isinstance(result, UnavailableShard):
            report.unavailable.append(result)
            continue

        samples += task.num_samples
        for sample, reason, detail in json.loads(result):
            report.reasons[reason] += 1
            report.examples.setdefault(reason, f"{task.entry.name} #{sample}: {detail}")
            report.dropped[task.dataset].setdefault(task.shard, []).append(sample)

    return report._replace(samples=samples)


def filters_from_mapping(
    mapping: Mapping[str, Any], source: str
) -> tuple[FilterConfig, SampleKeys]:
    """The filters in the content of a YAML file.

    Args:
        mapping: A run configuration (`data: {filters: ...}`), a section `filters: ...`, or the
            filter settings alone.
        source: Name of the file, for error messages.

    Returns:
        The filters, and `data.image_keys` and `data.caption_keys`.

    Raises:
        ConfigError: The file has no filters, or a filter is invalid.
    """
    section: Any = mapping.get("data", mapping)
    if not isinstance(section, Mapping):
        raise ConfigError(f"{source}: `data` must be a section")

    filters = section.get("filters", {} if "data" in mapping else section)
    if not isinstance(filters, Mapping) or not filters:
        raise ConfigError(
            f"{source} has no filters; add them under `filters:`, for example `min_side: 64`"
        )

    images, captions = (
        tuple(map(str, value)) if isinstance(value := section.get(name), list) else default
        for name, default in zip(("image_keys", "caption_keys"), DEFAULT_KEYS, strict=True)
    )
    return from_mapping(FilterConfig, filters, source=source), SampleKeys(images, captions)


@dataclass(frozen=True)
class _ShardFilter:
    """Filters the samples of one shard; the result is JSON rows `[sample, reason, detail]`."""

    filters: FilterConfig
    keys: SampleKeys
    limits: LimitConfig

    def __call__(self, task: ShardTask) -> bytes:
        return json.dumps(list(self._rows(task))).encode()

    def _rows(self, task: ShardTask) -> Iterator[tuple[int, str, str]]:
        try:
            for sample, raw in read_samples(task):
                if isinstance(raw, SampleProblem):
                    yield sample, raw.reason, raw.detail
                    continue
                try:
                    self._check(raw)
                except DataError as error:
                    yield sample, error.slug, str(error)
        except ShardUnavailableError:
            raise
        except DataError as error:
            yield from ((sample, error.slug, str(error)) for sample in range(task.entry.samples))

    def _check(self, raw: RawSample) -> None:
        """The checks of `SampleProcessor`, except those that need pixels."""
        texts = SampleTexts(raw.members, self.limits)
        if self._conditions:
            check_fields(texts.fields(), self._conditions)
        self._check_caption(raw, texts)
        header = read_header(image_bytes(raw, self.keys.images))
        check_pixels(header, self.limits.pixels)
        check_image_size(header.width, header.height, self.filters)

    def _check_caption(self, raw: RawSample, texts: SampleTexts) -> None:
        weights = [1.0] * len(self.keys.captions)

        def is_allowed(text: str) -> bool:
            return caption_length_allowed(text, self.filters)

        if select_caption(texts, self.keys.captions, weights, None, is_allowed):
            return

        caption = select_caption(texts, self.keys.captions, weights, None)
        if caption:
            raise caption_length_error(caption, self.filters)
        raise no_caption_error(raw.members, self.keys.captions)

    @cached_property
    def _conditions(self) -> tuple[Condition, ...]:
        return parse_conditions(self.filters.require)
