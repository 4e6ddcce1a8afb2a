"""Where training is in its data, as a value; and how positions that must not be delivered are
jumped.

Positions count the samples of the order from the start of training. Those in `skip` do not exist
for a step: it takes the next ones instead, so that it always has its full number. What comes after
a state is therefore a function of (position, skip) alone, and ranges before the position change
nothing.

    skip = ((8, 12),), 4 pairs a step, from position 4:   4 5 6 7 | 12 13 14 15 | 16 ...
    positions of the states after the steps:                     8             16
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.common.errors import DataError

STATE_VERSION = 2

Ranges = tuple[tuple[int, int], ...]
"""Ranges of positions, each `(first, end)` with the end left out; rising and apart."""


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """All that must be kept to go on with the next sample."""

    version: int = STATE_VERSION
    position: int = 0
    """Samples consumed or skipped since the start of training, over all ranks."""
    seed: int = 0
    """Seed of the order and of every sample's augmentation."""
    data: str = ""
    """Fingerprint of all that makes the order (`loader.data_fingerprint`); empty before the first
    step."""
    skip: Ranges = ()
    """Positions that are never delivered."""

    def skipping(self, first: int, end: int) -> LoaderState:
        """The same state, but positions `first` to `end - 1` are never delivered; those before it
        were already."""
        return replace(self, skip=joined((*self.skip, (max(first, self.position), end))))

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "version": self.version,
            "position": self.position,
            "seed": self.seed,
            "data": self.data,
            "skip": [list(pair) for pair in self.skip],
        }

    @staticmethod
    def from_json(value: str | dict[str, Any]) -> LoaderState:
        """Read what `to_json` gave, as an object or as text; version 1 had no `skip`.

        Raises:
            DataError: It is not such a state, or of another version.
        """
        try:
            found = dict(json.loads(value) if isinstance(value, str) else value)
            version = found.pop("version", None)
            if version not in (1, STATE_VERSION):
                raise DataError(
                    f"the loader state has version {version!r}, but this program reads 1 and {STATE_VERSION}"
                )
            if version == 1 and "skip" in found:
                raise ValueError("version 1 has no `skip`")
            state = LoaderState(
                **found | {"skip": tuple((first, end) for first, end in found.get("skip", ()))}
            )
        except (TypeError, ValueError) as error:
            raise DataError(f"not a loader state: {error}") from error
        _check(state)
        return state


def joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Ranges sorted, with those that touch or overlap made one; empty ones vanish."""
    done: list[tuple[int, int]] = []
    for first, end in sorted(pair for pair in ranges if pair[0] < pair[1]):
        if done and first <= done[-1][1]:
            done[-1] = (done[-1][0], max(done[-1][1], end))
        else:
            done.append((first, end))
    return tuple(done)


def delivered(position: int, skip: Ranges, start: int, count: int) -> list[range]:
    """Which positions are delivered as numbers `start` to `start + count - 1` from `position` on.

    Args:
        position: Where counting begins.
        skip: Positions that are jumped.
        start: First number, 0 for the first position delivered.
        count: How many.

    Returns:
        `count` positions in rising order, as ranges.
    """
    found: list[range] = []
    at, ahead = position, start
    for first, end in (*skip, (None, None)):
        if end is not None and end <= at:
            continue
        room = ahead + count if first is None else max(0, first - at)
        passed = min(ahead, room)
        taken = min(count, room - passed)
        if taken:
            found.append(range(at + passed, at + passed + taken))
        ahead, count = ahead - passed, count - taken
        if not count or end is None:
            break
        at = end
    return found


def _check(state: LoaderState) -> None:
    numbers = (state.position, state.seed, *(number for pair in state.skip for number in pair))
    if not all(type(number) is int for number in numbers) or not isinstance(state.data, str):
        raise DataError(
            "not a loader state: its position, seed and skip must be whole numbers, its data text"
        )
    if (
        state.position < 0
        or any(first < 0 for first, _ in state.skip)
        or joined(state.skip) != state.skip
    ):
        raise DataError(
            f"not a loader state: position {state.position} and skip {list(map(list, state.skip))} must not be "
            f"negative, and the ranges must rise and lie apart"
        )
