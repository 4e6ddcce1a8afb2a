"""The order of training: each source in its own shuffled epochs, mixed into one stream.

Position `p` is the sample that follows `p` others, over all sources. A single source is its `Plan`.
Several sources are mixed by weight (`mixture.py`), and each runs through its epochs independently.
Without weights, the weight of a source is its number of samples x `repeats`: after the sum of these
over all sources, every sample was visited exactly `repeats` times, and every batch contains the
sources in proportion.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.seeds import named_seed
from data_pipeline.order.mixture import Mixture
from data_pipeline.order.plan import Plan, Window
from data_pipeline.order.source_fractions import SourceFractions, WeightSchedule
from data_pipeline.samples import SampleRef


@dataclass(frozen=True, kw_only=True)
class OrderSource:
    """The properties of one source that determine the order."""

    name: str
    """For messages and tables."""
    sizes: Sequence[int] | np.ndarray
    """Samples of each shard, dropped ones included."""
    dropped: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Shard index -> indices of dropped samples, ascending."""
    weights: WeightSchedule = ()
    """Points `(pairs, weight)`. One point is a constant weight; without points the weight is the
    number of samples x `repeats`."""
    repeats: int = 1

    @property
    def samples(self) -> int:
        """Number of samples that are not dropped."""
        return int(np.sum(self.sizes)) - sum(len(samples) for samples in self.dropped.values())


class Consumed(NamedTuple):
    """Progress of one source."""

    name: str
    samples: int
    epochs: float


class Order:
    """Maps positions to samples. Can be pickled; caches are not included."""

    def __init__(
        self, sources: Sequence[OrderSource], seed: int, shuffle_window: int, begin: int = 0
    ) -> None:
        """Plan the sources and mix them.

        Args:
            sources: The sources; their shards are numbered consecutively.
            seed: Seed of the shuffles.
            shuffle_window: Number of shards of a source whose samples are shuffled together.
            begin: Position of its first sample: where the phase of this order begins.

        Raises:
            ConfigError: A source with a weight above 0 has no samples, or all weights are 0.
        """
        self.sources, self.begin = tuple(sources), begin
        weighted = [bool(source.weights) for source in sources]
        if not sources or (any(weighted) and not all(weighted)):
            raise ConfigError("data.train needs sources, and a weight for all of them or for none")
        for source in sources:
            if not source.samples and not source.weights:
                raise ConfigError(_no_samples_message(source))

        self.fractions = SourceFractions([weights_of(source) for source in sources])
        self._mixture = Mixture(self.fractions)
        self._plans = self._make_plans(seed, shuffle_window)

    def samples(self, start: int, count: int) -> list[SampleRef]:
        """The samples at positions `start` to `start + count - 1`."""
        start = self._in_phase(start)
        if len(self._plans) == 1:
            return self._plan(0).samples(start, count)

        counts_before, sources = self._mixture.slice_at(start, count)
        counts = [0] * len(counts_before)
        if sources:
            counts = np.bincount(sources, minlength=len(counts_before)).tolist()

        sampled = []
        for source, (first, source_count) in enumerate(zip(counts_before, counts, strict=True)):
            refs = self._plan(source).samples(first, source_count) if source_count else []
            sampled.append(iter(refs))
        return [next(sampled[source]) for source in sources]

    def sources_of(self, start: int, count: int) -> list[int]:
        """The source of each of the positions `start` to `start + count - 1`."""
        if len(self._plans) == 1:
            return [0] * count
        return self._mixture.slice_at(self._in_phase(start), count).sources

    def consumed(self, position: int) -> list[Consumed]:
        """How many samples and epochs of each source come before a position, in this phase.

        Positions that a loader state skips count as consumed.
        """
        counts = self._counts_before(self._in_phase(position))
        return [
            Consumed(source.name, count, count / max(1, source.samples))
            for source, count in zip(self.sources, counts, strict=True)
        ]

    def shards_from(self, position: int) -> Iterator[list[int]]:
        """Shards in the order in which they are needed from a position on, without end.

        Each list holds the shards that are in use at the same time, one window per source: first
        those at `position`, then those after the first window change of any source, and so on.
        Newly needed shards come first in a list.
        """
        position = self._in_phase(position)
        counts_before = self._counts_before(position)
        windows = [
            plan.windows_from(first) if plan else iter(())
            for plan, first in zip(self._plans, counts_before, strict=True)
        ]
        queue = _WindowQueue(self._mixture, windows, counts_before)

        while queue.has_next and (
            not queue.in_use or queue.next_position <= position + len(windows)
        ):
            queue.advance()

        # The first windows interleaved: every source is needed at once.
        interleaved = zip_longest(*queue.in_use.values())
        yield [shard for row in interleaved for shard in row if shard is not None]

        while queue.has_next:
            source = queue.advance()
            others = [
                shard
                for other, shards in queue.in_use.items()
                if other != source
                for shard in shards
            ]
            yield queue.in_use[source] + others

    def _make_plans(self, seed: int, shuffle_window: int) -> list[Plan | None]:
        """One plan per source; None for a source that is never sampled."""
        plans: list[Plan | None] = []
        first_shard = 0
        for index, source in enumerate(self.sources):
            plan = None
            if self.fractions.is_sampled(index):
                if not source.samples:
                    raise ConfigError(_no_samples_message(source))
                # Sources with the same number of shards must not be shuffled identically. The
                # first source keeps the seed of the run.
                source_seed = named_seed(seed, "source", index) if index else seed
                plan = Plan(
                    source.sizes,
                    source_seed,
                    shuffle_window,
                    dropped=source.dropped,
                    first_shard=first_shard,
                )
            plans.append(plan)
            first_shard += len(source.sizes)
        return plans

    def _in_phase(self, position: int) -> int:
        """A position counted from the beginning of the phase."""
        if position < self.begin:
            raise ValueError(
                f"position {position} is before the phase, which begins at {self.begin}"
            )
        return position - self.begin

    def _counts_before(self, position: int) -> list[int]:
        """Number of samples of each source before a position of the phase."""
        return self._mixture.counts_before(position) if len(self._plans) > 1 else [position]

    def _plan(self, source: int) -> Plan:
        plan = self._plans[source]
        assert plan is not None, "a source with fraction 0 was sampled"
        return plan


class _WindowQueue:
    """The next window of every source, ordered by the position that needs it first."""

    def __init__(
        self, mixture: Mixture, windows: Sequence[Iterator[Window]], counts_before: Sequence[int]
    ) -> None:
        self._mixture, self._windows, self._counts_before = mixture, windows, counts_before
        self._heap: list[tuple[int, int, list[int]]] = []
        self.in_use: dict[int, list[int]] = {}
        """Source -> shards of its current window."""
        for source in range(len(windows)):
            self._push_next(source)

    @property
    def has_next(self) -> bool:
        return bool(self._heap)

    @property
    def next_position(self) -> int:
        """First position that needs the next window."""
        return self._heap[0][0]

    def advance(self) -> int:
        """Make the next window the current one of its source; returns the source."""
        _, source, self.in_use[source] = heapq.heappop(self._heap)
        self._push_next(source)
        return source

    def _push_next(self, source: int) -> None:
        window = next(self._windows[source], None)
        if window is None:
            return

        first = max(window.first, self._counts_before[source])
        position = self._mixture.approximate_position(source, first)
        if position is not None:
            heapq.heappush(self._heap, (position, source, window.shards))


def weights_of(source: OrderSource) -> WeightSchedule:
    """The weights of a source as configured, or its number of samples x `repeats`."""
    return source.weights or ((0, Fraction(source.samples * source.repeats)),)


def _no_samples_message(source: OrderSource) -> str:
    dropped = sum(len(samples) for samples in source.dropped.values())
    reason = f"its drop-list excludes all {dropped}" if dropped else "its manifest has none"
    return (
        f"data.train source {source.name!r} has no samples ({reason}); "
        f"remove the source, or set its weight to 0"
    )
