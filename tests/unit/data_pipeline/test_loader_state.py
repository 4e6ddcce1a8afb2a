"""The loader's state as JSON, and skipped positions."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.order.state import EndedPhase, LoaderState, delivered_positions, merge_ranges


def test_json_round_trip() -> None:
    ended = (EndedPhase(data="x", end=4), EndedPhase(data="y", end=9))
    state = LoaderState(
        position=12, seed=5, data="abc", skip=((14, 20), (30, 31)), ended_phases=ended
    )
    assert LoaderState.from_json(state.to_json()) == state
    assert LoaderState.from_json(json.dumps(state.to_json())) == state
    assert LoaderState.from_json(LoaderState().to_json()) == LoaderState()


def test_older_versions_are_read() -> None:
    old: dict[str, object] = {"version": 1, "position": 12, "seed": 5, "data": "abc"}
    expected = LoaderState(position=12, seed=5, data="abc")
    assert LoaderState.from_json(old) == expected
    second = old | {"version": 2, "skip": [[14, 20]]}
    assert LoaderState.from_json(second) == replace(expected, skip=((14, 20),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 4}, "version 4"),
        ({"version": True}, "version True"),
        ({"more": 2}, "not a loader state"),
        ({"version": 1}, "version 1, but has `skip`"),
        ({"version": 2}, "version 2, but has `ended_phases`"),
        ({"ended_phases": [{"data": "a", "end": 4}]}, r"\[4\].* position 3"),
        ({"ended_phases": [{"data": "a", "end": 2}, {"data": "b", "end": 1}]}, r"\[2, 1\]"),
        ({"ended_phases": [{"data": "a", "end": 1.5}]}, "`end` must be integers"),
        ({"ended_phases": [{"data": 1, "end": 1}]}, "`data` must be a string"),
        ({"ended_phases": [{"data": "a"}]}, "not a loader state"),
        ({"ended_phases": 3}, "not a loader state"),
        ({"position": -1}, "position -1 .*negative"),
        ({"position": 1.5}, "`position`.*integers"),
        ({"data": 7}, "`data` must be a string"),
        ({"skip": [[3, 2]]}, r"\[\[3, 2\]\]"),
        ({"skip": [[5, 6], [1, 2]]}, r"\[\[5, 6\], \[1, 2\]\]"),
        ({"skip": [[1, 2, 3]]}, "not a loader state"),
        ({"skip": [[1, 2], [2, 3]]}, r"\[\[1, 2\], \[2, 3\]\]"),
        ({"skip": 7}, "not a loader state"),
        ({"skip": [[-2, 3]]}, r"\[\[-2, 3\]\] .*negative"),
    ],
)
def test_invalid_fields(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        LoaderState.from_json(LoaderState(position=3).to_json() | change)


@pytest.mark.parametrize("text", ["{", "[1]", "7", "{}", "null"])
def test_invalid_json(text: str) -> None:
    with pytest.raises(DataError, match="loader state"):
        LoaderState.from_json(text)


def test_merging_of_ranges() -> None:
    ranges = [(8, 9), (1, 3), (3, 5), (4, 4), (20, 25), (21, 22)]
    assert merge_ranges(ranges) == ((1, 5), (8, 9), (20, 25))
    state = LoaderState(position=10).with_skipped(30, 40).with_skipped(35, 50)
    assert state.skip == ((30, 50),)
    # Positions before the current one were already delivered.
    assert state.with_skipped(0, 12).skip == ((10, 12), (30, 50))


def test_skipped_positions_match_a_loop() -> None:
    generator = random.Random(3)
    for _ in range(300):
        numbers = sorted(generator.sample(range(60), generator.choice([0, 2, 4, 8])))
        skip = merge_ranges(zip(numbers[::2], numbers[1::2], strict=True))
        skipped = {position for first, end in skip for position in range(first, end)}
        position = generator.randrange(40)
        expected = [other for other in range(position, 300) if other not in skipped]
        for _ in range(5):
            start, count = generator.randrange(80), generator.randrange(1, 30)
            ranges = delivered_positions(position, skip, start, count)
            positions = [other for part in ranges for other in part]
            assert positions == expected[start : start + count]
            assert all(len(part) for part in ranges)


def test_a_missing_field_is_named() -> None:
    fields = LoaderState(position=3).to_json()
    del fields["skip"]
    with pytest.raises(DataError, match="version 3, but lacks `skip`, which versions from 2 on"):
        LoaderState.from_json(fields)
