"""State of the data loader, and how excluded positions are skipped.

Positions count the samples of the order from the start of training. Positions in `skip` are never
delivered: a step takes the following positions instead, so every step has its full batch size.
Everything after a state is therefore a function of (position, skip), and ranges before the position
have no effect.

    skip = ((8, 12),), 4 pairs per step, from position 4:   4 5 6 7 | 12 13 14 15 | 16 ...
    positions of the states after the steps:                       8             16

Training on other data with the same weights is a new phase (`data.phase`): its order begins at the
position where the previous phase ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.seeds import named_seed

STATE_VERSION = 3

Ranges = tuple[tuple[int, int], ...]
"""Ranges of positions `(first, end)`, end exclusive; ascending, disjoint and not adjacent."""


@dataclass(frozen=True, kw_only=True)
class EndedPhase:
    """A part of training with one order of the data, which has ended."""

    data: str
    """Fingerprint of its data."""
    end: int
    """Position at which the next phase began."""


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """All state that is needed to resume with the next sample."""

    version: int = STATE_VERSION
    position: int = 0
    """Samples consumed or skipped since the start of training, over all ranks."""
    seed: int = 0
    """Seed of the run; see `order_seed`."""
    data: str = ""
    """Fingerprint of everything that determines the order (`sources.data_fingerprint`); empty
    before the first step."""
    skip: Ranges = ()
    """Positions that are never delivered."""
    ended_phases: tuple[EndedPhase, ...] = ()
    """Phases before the current one, in order."""

    @property
    def phase(self) -> int:
        """Number of the current phase, from 1."""
        return len(self.ended_phases) + 1

    @property
    def phase_begin(self) -> int:
        """Position at which the current phase began."""
        return self.ended_phases[-1].end if self.ended_phases else 0

    @property
    def order_seed(self) -> int:
        """Seed of the current phase's order and of its augmentation."""
        return phase_seed(self.seed, self.phase)

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
            "ended_phases": [asdict(phase) for phase in self.ended_phases],
        }

    @staticmethod
    def from_json(value: str | dict[str, Any]) -> LoaderState:
        """Parse the output of `to_json`, as an object or as text.

        Version 1 had no `skip`, version 2 no `ended_phases`.

        Raises:
            DataError: The value is not a loader state, or has an unknown version.
        """
        try:
            fields = dict(json.loads(value) if isinstance(value, str) else value)
            version = fields.pop("version", None)
            if version not in range(1, STATE_VERSION + 1) or isinstance(version, bool):
                raise DataError(
                    f"the loader state has version {version!r}, but this program reads versions "
                    f"1 to {STATE_VERSION}"
                )
            for name, first_version in (("skip", 2), ("ended_phases", 3)):
                if (name in fields) != (version >= first_version):
                    verb = "has" if name in fields else "lacks"
                    raise ValueError(
                        f"it has version {version}, but {verb} `{name}`, which versions from "
                        f"{first_version} on have"
                    )

            skip = tuple((first, end) for first, end in fields.get("skip", ()))
            ended = tuple(EndedPhase(**phase) for phase in fields.get("ended_phases", ()))
            state = LoaderState(**fields | {"skip": skip, "ended_phases": ended})
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
    ends = [phase.end for phase in state.ended_phases]
    skipped = (value for pair in state.skip for value in pair)
    integers = (state.position, state.seed, *skipped, *ends)
    strings = (state.data, *(phase.data for phase in state.ended_phases))
    if not all(type(value) is int for value in integers) or not all(
        isinstance(value, str) for value in strings
    ):
        raise DataError(
            "not a loader state: `position`, `seed`, `skip` and `end` must be integers, "
            "and `data` must be a string"
        )
    if ends != sorted(ends) or not all(0 <= end <= state.position for end in ends):
        raise DataError(
            f"not a loader state: the phases end at {ends}, but must end in order and before "
            f"position {state.position}"
        )

    negative = state.position < 0 or any(first < 0 for first, _ in state.skip)
    if negative or merge_ranges(state.skip) != state.skip:
        raise DataError(
            f"not a loader state: position {state.position} and skip "
            f"{list(map(list, state.skip))} must not be negative, and the ranges must be "
            f"ascending and disjoint"
        )


def phase_seed(seed: int, phase: int) -> int:
    """Seed of a phase's order; different in every phase, so that samples that several phases share
    are shuffled and augmented again."""
    return seed if phase == 1 else named_seed(seed, "phase", phase)


def check_phase(state: LoaderState, phase: int) -> None:
    """Check that a state can continue in a phase: its own or, if it has begun, the next one.

    Raises:
        ConfigError: It cannot.
    """
    if not state.data and phase != 1:
        raise ConfigError(
            f"data.phase is {phase}, but a new run begins with phase 1; a later phase "
            f"continues a run that has been trained on other data"
        )
    if phase not in (state.phase, state.phase + 1):
        raise ConfigError(
            f"data.phase is {phase}, but the loader state (position {state.position}) is in phase "
            f"{state.phase}; set it to {state.phase} to continue with the same data, or to "
            f"{state.phase + 1} to continue with other data"
        )


def enter_phase(state: LoaderState, *, seed: int, fingerprint: str, phase: int) -> LoaderState:
    """The state from which training continues: in its phase, or at the beginning of the next one.

    Args:
        state: The saved state, or a new one.
        seed: Seed of the run.
        fingerprint: Hash of the data that determines the order (`data_fingerprint`).
        phase: `data.phase`.

    Raises:
        ConfigError: The seed is another one, or `phase` is neither the state's phase nor the next.
        DataError: The phase is the same, but the data is different.
    """
    check_phase(state, phase)
    if not state.data:
        return replace(state, seed=seed, data=fingerprint)

    if state.seed != seed:
        raise ConfigError(
            f"seed is {seed}, but the loader state was saved with seed {state.seed}, which gives a "
            f"different data order; restore the seed or start a new run"
        )
    if phase == state.phase + 1:
        ended = EndedPhase(data=state.data, end=state.position)
        skip = tuple((first, min(end, ended.end)) for first, end in state.skip if first < ended.end)
        return replace(
            state, data=fingerprint, skip=skip, ended_phases=(*state.ended_phases, ended)
        )
    if state.data != fingerprint:
        raise DataError(
            f"the loader state (position {state.position}) was saved with different shards, "
            f"weights, drop-lists or data.shuffle_window (fingerprint {state.data}, now "
            f"{fingerprint}), which gives a different data order; restore the data settings, or "
            f"set data.phase={phase + 1} to continue with the same weights on the new data"
        )
    return state
