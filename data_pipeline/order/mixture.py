"""Weighted mixture of sources into one stream: exact, and a pure function of the position.

I(t) is the number of samples that a source should have contributed when the mixture has t samples:
the integral of its sampling fraction (`source_fractions.py`). Over all sources, I(t) sums to
exactly t. At tick t = 1, 2, ... a source has contributed N(t) = floor(I(t) + 1/2) samples. The new
samples of a tick are emitted in the order of the sources.

    fractions 1/2, 1/4, 1/4: tick 1: a   tick 2: b c   tick 3: a   tick 4: -   tick 5: a ...
    stream                   a b c a | a b c a | ...        period of four positions, no drift

- A fraction is at most 1, so a tick emits at most one sample per source, and N never decreases.
- Where every I(t) is an integer, N(t) = I(t), so exactly t samples were emitted: position t is
  reached with exact counts. If fraction x batch size is an integer for every source, this holds at
  every batch boundary, and each batch contains each source in exactly its fraction.
- Elsewhere, with m sources: N is within 1/2 of I, so the sum S(t) of all N is within m/2 of t, and
  position p is in a tick t with |t - p| <= m/2 + 1. As I grows by at most 1 per tick, the count of
  a source before position p is within (m + 3) / 2 of I(p), however long the run.
- Therefore the tick of a position is found by a binary search over about m ticks, and seeking costs
  the same at any position.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from data_pipeline.order.source_fractions import SourceFractions


class MixtureSlice(NamedTuple):
    """The sources of a range of consecutive positions."""

    counts_before: list[int]
    """Number of samples that each source contributed before the first position."""
    sources: list[int]
    """Index of the source that each position takes its next sample from."""


class Mixture:
    """Assigns a source to every position; see the module docstring."""

    def __init__(self, fractions: SourceFractions) -> None:
        self.fractions = fractions

    def counts_before(self, position: int) -> list[int]:
        """Number of samples that each source contributed before a position."""
        return self.slice_at(position, 0).counts_before

    def slice_at(self, position: int, count: int) -> MixtureSlice:
        """The sources of positions `position` to `position + count - 1`."""
        tick = self._tick_of(position)
        counts = self.fractions.expected_counts(tick - 1)
        sources = self._sources_from(tick)
        # The tick may emit some samples before `position`.
        for source in islice(sources, position - sum(counts)):
            counts[source] += 1
        return MixtureSlice(counts, list(islice(sources, count)))

    def approximate_position(self, source: int, sample: int) -> int | None:
        """Position of the sample with index `sample` of a source; None if it is never reached.

        The result differs from the exact position by at most the number of sources.
        """
        return self.fractions.first_position_above(source, sample)

    def _sources_from(self, tick: int) -> Iterator[int]:
        """The source of each sample that a tick and all later ones emit, without end."""
        counts = self.fractions.expected_counts(tick - 1)
        while True:
            new_counts = self.fractions.expected_counts(tick)
            for source, (old, new) in enumerate(zip(counts, new_counts, strict=True)):
                if new > old:
                    yield source
            counts = new_counts
            tick += 1

    def _tick_of(self, position: int) -> int:
        """The tick that emits a position: the first t with S(t) > `position`."""
        max_distance = self.fractions.num_sources // 2 + 1
        low, high = max(1, position - max_distance), position + max_distance + 1
        while low < high:
            middle = (low + high) // 2
            if sum(self.fractions.expected_counts(middle)) > position:
                high = middle
            else:
                low = middle + 1
        return low
