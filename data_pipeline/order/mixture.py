"""Weighted mixture of sources into one stream: exact, and a pure function of the position.

I(t) is the number of samples that a source should have contributed after t pairs: the integral of
its sampling fraction (`source_fractions.py`). Over all sources, I(t) sums to exactly t. At tick
t = 1, 2, ... a source has contributed N(t) = floor(I(t) + 1/2) samples. The new samples of a tick
are emitted in the order of the sources.

    fractions 1/2, 1/4, 1/4: tick 1: a   tick 2: b c   tick 3: a   tick 4: -   tick 5: a ...
    stream                   a b c a | a b c a | ...        period of four positions, no drift

- A fraction is at most 1, so a tick emits at most one sample per source, and N never decreases.
- Where every I(t) is an integer, N(t) = I(t), so exactly t samples were emitted: position t is
  reached with exact counts. If fraction x batch size is an integer for every source, this holds at
  every batch boundary, and each batch contains each source in exactly its fraction.
- Elsewhere, with m sources: N is within 1/2 of I, so the sum S(t) of all N is within m/2 of t, and
  position p is in a tick t with |t - p| <= m/2 + 1. As I grows by at most 1 per tick, the count of
  a source before position p is within (m + 3) / 2 of I(p), however long the run.
- Therefore the tick of a position is searched among about m candidates, and seeking costs the same
  at any position.
"""

from __future__ import annotations

from typing import NamedTuple

from data_pipeline.order.source_fractions import SourceFractions


class MixtureSlice(NamedTuple):
    """A range of consecutive positions."""

    firsts: list[int]
    """Number of samples that each source contributed before the first position."""
    sources: list[int]
    """Index of the source that each position takes its next sample from."""


class Mixture:
    """Assigns a source to every position; see the module docstring."""

    def __init__(self, fractions: SourceFractions) -> None:
        self.fractions = fractions

    def before(self, position: int) -> list[int]:
        """Number of samples that each source contributed before a position."""
        return self.slice_at(position, 0).firsts

    def slice_at(self, position: int, count: int) -> MixtureSlice:
        """The sources of positions `position` to `position + count - 1`."""
        expected_counts = self.fractions.expected_counts
        tick = self._tick(position)
        counts = expected_counts(tick - 1)
        # Positions of this tick that come before `position`.
        to_skip = position - sum(counts)
        firsts: list[int] | None = None
        sources: list[int] = []

        while True:
            after = expected_counts(tick)
            for source, (old, new) in enumerate(zip(counts, after, strict=True)):
                if new > old:
                    if to_skip:
                        to_skip -= 1
                        counts[source] = new
                        continue

                    if firsts is None:
                        # `counts` includes the earlier sources of this tick, not the later ones.
                        firsts = list(counts)
                    if len(sources) == count:
                        return MixtureSlice(firsts, sources)
                    sources.append(source)
                    counts[source] = new
            tick += 1

    def position_of(self, source: int, sample: int) -> int | None:
        """Position of sample number `sample` of a source; None if it is never reached.

        The result may be off by up to the number of sources.
        """
        return self.fractions.first_position_above(source, sample)

    def _tick(self, position: int) -> int:
        """The tick that contains a position: the first t after which more than `position` samples
        were emitted."""
        max_distance = self.fractions.count // 2 + 1
        low, high = max(1, position - max_distance), position + max_distance + 1
        while low < high:
            middle = (low + high) // 2
            if sum(self.fractions.expected_counts(middle)) > position:
                high = middle
            else:
                low = middle + 1
        return low
