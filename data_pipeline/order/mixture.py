"""Several sources as one stream, mixed by weight: exact in every batch, and a function of the
position.

Let I(t) be what a source is due after t pairs (`shares.py`), over all sources together exactly t.
At tick t = 1, 2, ... a source has been handed out N(t) = floor(I(t) + 1/2) samples; the new ones of
a tick come in the order of the sources.

    shares 1/2, 1/4, 1/4:    tick 1: a   tick 2: b c   tick 3: a   tick 4: -   tick 5: a ...
    stream                   a b c a | a b c a | ...        four positions a round, never off for good

- A share is at most 1, so a tick hands out at most one sample of a source, and N never falls.
- Where every I(t) is whole, N(t) = I(t), so exactly t samples were handed out: position t is reached
  with exact counts. If share x batch is whole for every source, that is so at every batch's border,
  and each batch holds each source exactly by its share.
- Elsewhere, of m sources: N is within 1/2 of I, so the sum S(t) of all N is within m/2 of t, and position p is
  in a tick t with |t - p| <= m/2 + 1. As I grows by at most 1 a tick, the count of a source before
  position p is within (m + 3) / 2 of its due I(p): it never drifts, however long the run.
- For the same reason the tick of a position is found among about m candidates: seeking costs the same
  at any position.
"""

from __future__ import annotations

from typing import NamedTuple

from data_pipeline.order.shares import Shares


class Stretch(NamedTuple):
    """Some positions in a row."""

    firsts: list[int]
    """How many samples each source gave before the first position."""
    sources: list[int]
    """Which source each position takes its next sample from."""


class Mixture:
    """Which source comes when; see the module's text."""

    def __init__(self, shares: Shares) -> None:
        self.shares = shares

    def before(self, position: int) -> list[int]:
        """How many samples each source gave before a position."""
        return self.stretch(position, 0).firsts

    def stretch(self, position: int, count: int) -> Stretch:
        """The sources of positions `position` to `position + count - 1`."""
        due = self.shares.due
        tick = self._tick(position)
        counts = due(tick - 1)
        inside = position - sum(counts)  # positions of this tick that lie before
        firsts: list[int] | None = None
        sources: list[int] = []
        while True:
            after = due(tick)
            for source, (old, new) in enumerate(zip(counts, after, strict=True)):
                if new > old:
                    if inside:
                        inside -= 1
                        counts[source] = new
                        continue
                    if firsts is None:
                        # Sources before this one in the tick are already counted; later ones are
                        # not.
                        firsts = list(counts)
                    if len(sources) == count:
                        return Stretch(firsts, sources)
                    sources.append(source)
                    counts[source] = new
            tick += 1

    def reached(self, source: int, number: int) -> int | None:
        """The position of a source's sample, up to a few places (the number of sources); None is
        never."""
        return self.shares.ever_due(source, number)

    def _tick(self, position: int) -> int:
        """The tick in which a position lies: the first t with more than `position` samples handed
        out."""
        reach = self.shares.count // 2 + 1
        low, high = max(1, position - reach), position + reach + 1
        while low < high:
            middle = (low + high) // 2
            if sum(self.shares.due(middle)) > position:
                high = middle
            else:
                low = middle + 1
        return low
