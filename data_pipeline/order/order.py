"""The order of training: every source in its own shuffled epochs, mixed into one stream.

Position `p` means: `p` samples came before, from all sources. A source alone is its `Plan`; several
are mixed by weight (`mixture.py`), and each goes through its own epochs at its own pace. Without
weights a source's weight is its samples x `repeats`, so that after the sum of those over all
sources every sample came exactly `repeats` times, and every batch holds the sources in proportion.
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
from data_pipeline.order.plan import Plan
from data_pipeline.order.shares import Points, Shares
from data_pipeline.samples import SampleRef


@dataclass(frozen=True, kw_only=True)
class OrderSource:
    """What the order needs to know of one source."""

    name: str
    """For messages and tables."""
    sizes: Sequence[int] | np.ndarray
    """Samples of each shard, dropped ones included."""
    dropped: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Numbers of dropped samples, rising, by shard."""
    weights: Points = ()
    """`(pairs, weight)`; one point is a constant weight, none means by samples x `repeats`."""
    repeats: int = 1

    @property
    def samples(self) -> int:
        """Samples that are left."""
        return int(np.sum(self.sizes)) - sum(len(gone) for gone in self.dropped.values())


class Consumed(NamedTuple):
    """How far a source has come."""

    name: str
    samples: int
    epochs: float


class Order:
    """Which sample comes when; travels to other processes without what it remembers."""

    def __init__(self, sources: Sequence[OrderSource], seed: int, shuffle_window: int) -> None:
        """Plan the sources and mix them.

        Args:
            sources: In order; their shards are numbered through.
            seed: Changes the order.
            shuffle_window: Shards of a source whose samples are shuffled together.

        Raises:
            ConfigError: A source that is drawn from has no samples, or all weights are 0.
        """
        self.sources = tuple(sources)
        weighted = [bool(source.weights) for source in sources]
        if not sources or (any(weighted) and not all(weighted)):
            raise ConfigError("data.train needs sources, and a weight for all of them or for none")
        for source in sources:
            if not source.samples and not source.weights:
                raise ConfigError(_empty(source))
        self.shares = Shares([weights_of(source) for source in sources])
        self._mixture = Mixture(self.shares)
        self._plans: list[Plan | None] = []
        shards = 0
        for number, source in enumerate(sources):
            drawn = self.shares.is_ever_drawn(number)
            if drawn and not source.samples:
                raise ConfigError(_empty(source))
            # Two sources with as many shards must not be shuffled alike; the first keeps the run's
            # seed.
            own = named_seed(seed, "source", number) if number else seed
            self._plans.append(
                Plan(source.sizes, own, shuffle_window, dropped=source.dropped, first_shard=shards)
                if drawn
                else None
            )
            shards += len(source.sizes)

    def samples(self, start: int, count: int) -> list[SampleRef]:
        """The samples at positions `start` to `start + count - 1`."""
        if len(self._plans) == 1:
            return self._plan(0).samples(start, count)
        firsts, sources = self._mixture.stretch(start, count)
        taken = (
            np.bincount(sources, minlength=len(firsts)).tolist() if sources else [0] * len(firsts)
        )
        drawn = [
            iter(self._plan(number).samples(first, share)) if share else iter(())
            for number, (first, share) in enumerate(zip(firsts, taken, strict=True))
        ]
        return [next(drawn[source]) for source in sources]

    def sources_of(self, start: int, count: int) -> list[int]:
        """From which source each of these positions takes its sample."""
        return self._mixture.stretch(start, count).sources if len(self._plans) > 1 else [0] * count

    def consumed(self, position: int) -> list[Consumed]:
        """How many samples of each source lie before a position, and how many of its epochs that
        is.

        Positions that a state skips count as consumed.
        """
        before = self._mixture.before(position) if len(self._plans) > 1 else [position]
        return [
            Consumed(source.name, count, count / max(1, source.samples))
            for source, count in zip(self.sources, before, strict=True)
        ]

    def shards_from(self, position: int) -> Iterator[list[int]]:
        """Shards in the order in which they are needed, without end.

        Each list holds the shards that are in use together, one window of each source: first those
        at `position`, then those after the first change of any source's window, and so on; what is
        new comes first in a list.
        """
        before = self._mixture.before(position) if len(self._plans) > 1 else [position]
        coming = [
            plan.windows_from(number) if plan else iter(())
            for plan, number in zip(self._plans, before, strict=True)
        ]
        queue: list[tuple[int, int, list[int]]] = []

        def put(source: int) -> None:
            window = next(coming[source], None)
            needed = (
                None
                if window is None
                else self._mixture.reached(source, max(window.first, before[source]))
            )
            if window is not None and needed is not None:
                heapq.heappush(queue, (needed, source, window.shards))

        def take() -> int:
            _, source, in_use[source] = heapq.heappop(queue)
            put(source)
            return source

        in_use: dict[int, list[int]] = {}
        for source in range(len(coming)):
            put(source)
        while queue and (not in_use or queue[0][0] <= position + len(coming)):
            take()
        # The first lists side by side: each source is needed at once.
        yield [shard for row in zip_longest(*in_use.values()) for shard in row if shard is not None]
        while queue:
            source = take()
            others = [
                shard for other, shards in in_use.items() if other != source for shard in shards
            ]
            yield in_use[source] + others

    def _plan(self, source: int) -> Plan:
        plan = self._plans[source]
        assert plan is not None, "a source without a share was drawn"
        return plan


def weights_of(source: OrderSource) -> Points:
    """A source's weights: those that were given, or one by its samples and `repeats`."""
    return source.weights or ((0, Fraction(source.samples * source.repeats)),)


def _empty(source: OrderSource) -> str:
    gone = sum(len(dropped) for dropped in source.dropped.values())
    why = f"its drop-list leaves out all {gone}" if gone else "its manifest has none"
    return f"data.train source {source.name!r} has no samples ({why}); leave it out, or set its weight to 0"
