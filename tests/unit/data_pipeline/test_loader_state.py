"""Where training is in its data, as a value; and positions that are jumped."""

from __future__ import annotations

import json
import random

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.order.state import LoaderState, delivered, joined


def test_the_state_is_a_value() -> None:
    state = LoaderState(position=12, seed=5, data="abc", skip=((14, 20), (30, 31)))
    assert LoaderState.from_json(state.to_json()) == state
    assert LoaderState.from_json(json.dumps(state.to_json())) == state
    assert LoaderState.from_json(LoaderState().to_json()) == LoaderState()


def test_a_state_of_version_1_is_read() -> None:
    old = {"version": 1, "position": 12, "seed": 5, "data": "abc"}
    assert LoaderState.from_json(old) == LoaderState(position=12, seed=5, data="abc")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "version 3, but this program reads 1 and 2"),
        ({"more": 2}, "not a loader state"),
        ({"version": 1}, "version 1 has no `skip`"),
        ({"position": -1}, "must not be"),
        ({"position": 1.5}, "whole numbers"),
        ({"data": 7}, "its data text"),
        ({"skip": [[3, 2]]}, "rise and lie apart"),
        ({"skip": [[5, 6], [1, 2]]}, "rise and lie apart"),
        ({"skip": [[1, 2, 3]]}, "not a loader state"),
        ({"skip": [[1, 2], [2, 3]]}, "rise and lie apart"),
        ({"skip": 7}, "not a loader state"),
        ({"skip": [[-2, 3]]}, "must not be"),
    ],
)
def test_another_thing_is_no_state(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        LoaderState.from_json(LoaderState(position=3).to_json() | change)


@pytest.mark.parametrize("text", ["{", "[1]", "7", "{}", "null"])
def test_other_text_is_no_state(text: str) -> None:
    with pytest.raises(DataError, match="loader state"):
        LoaderState.from_json(text)


def test_ranges_are_joined() -> None:
    assert joined([(8, 9), (1, 3), (3, 5), (4, 4), (20, 25), (21, 22)]) == (
        (1, 5),
        (8, 9),
        (20, 25),
    )
    state = LoaderState(position=10).skipping(30, 40).skipping(35, 50)
    assert state.skip == ((30, 50),)
    # What was delivered before cannot be taken back.
    assert state.skipping(0, 12).skip == ((10, 12), (30, 50))


def test_positions_are_jumped_as_a_loop_would() -> None:
    draw = random.Random(3)
    for _ in range(300):
        numbers = sorted(draw.sample(range(60), draw.choice([0, 2, 4, 8])))
        skip = joined(zip(numbers[::2], numbers[1::2], strict=True))
        gone = {place for first, end in skip for place in range(first, end)}
        position = draw.randrange(40)
        expected = [place for place in range(position, 300) if place not in gone]
        for _ in range(5):
            start, count = draw.randrange(80), draw.randrange(1, 30)
            parts = delivered(position, skip, start, count)
            assert [place for part in parts for place in part] == expected[start : start + count]
            assert all(len(part) for part in parts)
