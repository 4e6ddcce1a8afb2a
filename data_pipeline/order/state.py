"""State of the data loader, and how excluded positions are skipped.

Positions count the samples of the order from the start of training. Positions in `skip` are never
delivered: a step takes the following positions instead, so every step has its full batch size.
Everything after a state is therefore a function of (position, skip), and ranges before the position
have no effect.

    skip = ((8, 12),), 4 pairs per step, from position 4:   4 5 6 7 | 12 13 14 15 | 16 ...
    positions of the states after the steps:                       8             16
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.common.errors import ConfigError, DataError

STATE_VERSION = 2

Ranges = tuple[tuple[int, int], ...]
"""Ranges of positions `(first, end)`, end exclusive; ascending, disjoint and not adjacent."""


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """All state that is needed to resume with the next sample."""

    version: int = STATE_VERSION
    position: int = 0
    """Samples consumed or skipped since the start of training, over all ranks."""
    seed: int = 0
    """Seed of the order and of every sample's augmentation."""
    data: str = ""
    """Fingerprint of everything that determines the order (`sources.data_fingerprint`); empty
    before the first step."""
    skip: Ranges = ()
    """Positions that are never delivered."""

    def with_skipped(self, first: int, end: int) -> LoaderState:
        """A copy of the state that also skips positions `first` to `end - 1`.

        Positions before the current one were already delivered and are not added.
        """
        return replace(self, skip=merge_ranges((*self.skip, (max(first, self.position), end))))

    def to_json(self) -> dict[str, Any]:
        """The state as a JSON object."""
        return {
            "version": self.version,
            "position": self.position,
            "seed": self.seed,
            "data": self.data,
            "skip": [list(pair) for pair in self.skip],
        }

    @staticmethod
    def from_json(value: str | dict[str, Any]) -> LoaderState:
        """Parse the output of `to_json`, as an object or as text; version 1 had no `skip`.

        Raises:
            DataError: The value is not a loader state, or has an unknown version.
        """
        try:
            fields = dict(json.loads(value) if isinstance(value, str) else value)
            version = fields.pop("version", None)
            if version not in (1, STATE_VERSION):
                raise DataError(
                    f"the loader state has version {version!r}, but this program reads versions "
                    f"1 and {STATE_VERSION}"
                )
            if version == 1 and "skip" in fields:
                raise ValueError("version 1 has no `skip`")

            skip = tuple((first, end) for first, end in fields.get("skip", ()))
            state = LoaderState(**fields | {"skip": skip})
        except (TypeError, ValueError) as error:
            raise DataError(f"not a loader state: {error}") from error

        _validate(state)
        return state


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Sort ranges, merge those that overlap or touch, and remove empty ones."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted(pair for pair in ranges if pair[0] < pair[1]):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((first, end))
    return tuple(merged)


def delivered_positions(position: int, skip: Ranges, start: int, count: int) -> list[range]:
    """The delivered positions with indices `start` to `start + count - 1`, counted from `position`.

    Args:
        position: Where counting begins.
        skip: Positions that are not delivered.
        start: Index of the first delivered position; 0 is the first one at or after `position`.
        count: Number of positions.

    Returns:
        `count` positions in ascending order, as ranges.
    """
    ranges: list[range] = []
    current, to_skip = position, start
    for first, end in (*skip, (None, None)):
        if end is not None and end <= current:
            continue

        available = to_skip + count if first is None else max(0, first - current)
        skipped = min(to_skip, available)
        taken = min(count, available - skipped)
        if taken:
            ranges.append(range(current + skipped, current + skipped + taken))

        to_skip, count = to_skip - skipped, count - taken
        if not count or end is None:
            break
        current = end
    return ranges


def _validate(state: LoaderState) -> None:
    integers = (state.position, state.seed, *(value for pair in state.skip for value in pair))
    if not all(type(value) is int for value in integers) or not isinstance(state.data, str):
        raise DataError(
            "not a loader state: `position`, `seed` and `skip` must be integers, "
            "and `data` must be a string"
        )

    negative = state.position < 0 or any(first < 0 for first, _ in state.skip)
    if negative or merge_ranges(state.skip) != state.skip:
        raise DataError(
            f"not a loader state: position {state.position} and skip "
            f"{list(map(list, state.skip))} must not be negative, and the ranges must be "
            f"ascending and disjoint"
        )


def check_state(state: LoaderState, seed: int, fingerprint: str) -> None:
    """Check that a saved position refers to the same order.

    Args:
        state: The saved state.
        seed: Seed of the run.
        fingerprint: Hash of the data that determines the order (`data_fingerprint`).

    Raises:
        ConfigError: The seed is another one.
        DataError: The data is different.
    """
    if not state.data:
        return

    if state.seed != seed:
        raise ConfigError(
            f"seed is {seed}, but the loader state was saved with seed {state.seed}, which gives a "
            f"different data order; restore the seed or start a new run"
        )
    if state.data != fingerprint:
        raise DataError(
            f"the loader state (position {state.position}) was saved with different shards, "
            f"weights, drop-lists or data.shuffle_window (fingerprint {state.data}, now "
            f"{fingerprint}), which gives a different data order; restore the data settings or "
            f"start a new run"
        )
