"""Which samples training would leave out: the same filters, in the same order, without decoding a
picture."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from data_pipeline.common.config import from_mapping
from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.processes import WHOLE, Part
from data_pipeline.content.captions import Texts, choose
from data_pipeline.content.filters import (
    Condition,
    check_fields,
    check_size,
    compile_conditions,
    fits,
    unfit_caption,
)
from data_pipeline.content.headers import read_header
from data_pipeline.content.images import check_pixels
from data_pipeline.content.recipe import picture_of
from data_pipeline.preparing.visit import ShardTask, Unread, UnreadError, Visits, opened, tasks_of
from data_pipeline.samples import RawSample
from data_pipeline.settings import FilterConfig, LimitConfig
from data_pipeline.shards.manifest import Manifest


class Filtered(NamedTuple):
    """What filters leave out."""

    samples: int
    reasons: Counter[str]
    """Samples by reason; `filter:...` is left out on purpose, anything else is bad."""
    examples: dict[str, str]
    """For each reason the first sample and why."""
    dropped: list[dict[int, list[int]]]
    """For each dataset, numbers of the samples by number of their shard."""
    unread: list[Unread]
    """Shards that could not be had; nothing of them is counted."""


def filter_samples(
    manifests: Sequence[Manifest],
    filters: FilterConfig,
    *,
    caption_keys: Sequence[str] = ("txt",),
    limits: LimitConfig | None = None,
    workers: int = 0,
    part: Part = WHOLE,
    work: str = "",
) -> Filtered:
    """Ask the filters about every sample.

    Args:
        manifests: The datasets.
        filters: What to leave out.
        caption_keys: Where captions are.
        limits: What a sample may ask for at most; beyond it is bad.
        workers: Processes.
        part: Share of the shards.
        work: Where results are kept.

    Raises:
        ConfigError: A condition is none.
    """
    compile_conditions(filters.require)  # so that a bad one is found now
    judge = _Judge(filters, tuple(caption_keys), limits or LimitConfig())
    visits = Visits(
        label="filtering", workers=workers, work=work, settings=repr(("filter", 2, judge))
    )
    done = Filtered(0, Counter(), {}, [{} for _ in manifests], [])
    samples = 0
    for task, result in visits.each(tasks_of(manifests, part), judge):
        if isinstance(result, Unread):
            done.unread.append(result)
            continue
        samples += task.num_samples
        for number, reason, detail in json.loads(result):
            done.reasons[reason] += 1
            done.examples.setdefault(reason, f"{task.entry.name} #{number}: {detail}")
            done.dropped[task.dataset].setdefault(task.shard, []).append(number)
    return done._replace(samples=samples)


def filters_in(
    mapping: Mapping[str, Any], source: str
) -> tuple[FilterConfig, tuple[str, ...] | None]:
    """The filters of a settings file: a run's (`data: {filters: ...}`), `filters: ...`, or only the
    settings.

    Returns:
        The filters, and `data.caption_keys` if the file has them.

    Raises:
        ConfigError: There are none, or one is no filter.
    """
    section: Any = mapping.get("data", mapping)
    if not isinstance(section, Mapping):
        raise ConfigError(f"{source}: `data` is no section")
    keys = section.get("caption_keys")
    found = section.get("filters", {} if "data" in mapping else section)
    if not isinstance(found, Mapping) or not found:
        raise ConfigError(
            f"{source} has no filters; write them under `filters:`, such as `min_side: 64`"
        )
    return from_mapping(FilterConfig, found, source=source), tuple(map(str, keys)) if isinstance(
        keys, list
    ) else None


@dataclass(frozen=True)
class _Judge:
    """Asks about the samples of one shard; its result is JSON rows `[number, reason, detail]`."""

    filters: FilterConfig
    caption_keys: tuple[str, ...]
    limits: LimitConfig

    def __call__(self, task: ShardTask) -> bytes:
        return json.dumps(list(self._rows(task))).encode()

    def _rows(self, task: ShardTask) -> Iterator[tuple[int, str, str]]:
        try:
            with opened(task) as shard:
                for number, raw in shard.samples():
                    try:
                        if isinstance(raw, DataError):
                            raise raw
                        self._check(raw)
                    except DataError as error:
                        yield number, error.slug, str(error)
        except UnreadError:
            raise
        except DataError as error:
            yield from ((number, error.slug, str(error)) for number in range(task.entry.samples))

    def _check(self, raw: RawSample) -> None:
        """As `Recipe.make` does, but for the pixels."""
        texts = Texts(raw.members, self.limits)
        if self._conditions:
            check_fields(texts.fields(), self._conditions)
        self._check_caption(texts)
        header = read_header(picture_of(raw))
        check_pixels(header, self.limits.pixels)
        check_size(header.width, header.height, self.filters)

    def _check_caption(self, texts: Texts) -> None:
        weights = [1.0] * len(self.caption_keys)
        if choose(texts, self.caption_keys, weights, None, lambda text: fits(text, self.filters)):
            return
        unfit = choose(texts, self.caption_keys, weights, None)
        if unfit:
            raise unfit_caption(unfit, self.filters)
        raise DataError(f"no caption under {', '.join(self.caption_keys)}", slug="no-caption")

    @cached_property
    def _conditions(self) -> tuple[Condition, ...]:
        return compile_conditions(self.filters.require)
