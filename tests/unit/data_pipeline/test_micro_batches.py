"""Split of a step into micro-batches: exact, or an error with values that are valid."""

from __future__ import annotations

import re

import pytest

from data_pipeline.common.errors import ConfigError
from data_pipeline.order.micro_batches import (
    largest_micro_batch_size,
    micro_batch_positions,
    micro_batches_per_step,
)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batch_is_the_same_for_any_world_size(world_size: int) -> None:
    positions = []
    for micro in range(micro_batches_per_step(16, 2, world_size)):
        for rank in range(world_size):
            positions += micro_batch_positions(
                32, micro, rank, micro_batch_size=2, world_size=world_size
            )
    assert positions == list(range(32, 48))


def test_invalid_global_batch_size() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size is 250, .*64.* 2 ranks .*256"):
        micro_batches_per_step(250, 64, 2)
    with pytest.raises(ConfigError, match=r"global_batch_size is 16, .*global_batch_size=128"):
        micro_batches_per_step(16, 64, 2)


@pytest.mark.parametrize("global_batch_size", range(1, 40))
@pytest.mark.parametrize(("micro_batch_size", "ranks"), [(3, 2), (4, 4), (7, 1)])
def test_suggested_values_are_valid_and_nearest(
    global_batch_size: int, micro_batch_size: int, ranks: int
) -> None:
    pairs_of_all_ranks = micro_batch_size * ranks
    if global_batch_size % pairs_of_all_ranks == 0:
        count = micro_batches_per_step(global_batch_size, micro_batch_size, ranks)
        assert count == global_batch_size // pairs_of_all_ranks
        return

    with pytest.raises(ConfigError) as error:
        micro_batches_per_step(global_batch_size, micro_batch_size, ranks)
    message = str(error.value)
    nearest = int(re.search(r"batch\.global_batch_size=(\d+)", message)[1])  # type: ignore[index]
    micro_batches_per_step(nearest, micro_batch_size, ranks)
    distances = [abs(n - global_batch_size) for n in range(1, 200) if n % pairs_of_all_ranks == 0]
    assert abs(nearest - global_batch_size) == min(distances)

    micro = re.search(r"or batch\.micro_batch_size=(\d+)", message)
    assert (micro is not None) == (global_batch_size % ranks == 0)
    if micro:
        micro_batches_per_step(global_batch_size, int(micro[1]), ranks)


def test_one_micro_batch_per_step() -> None:
    assert largest_micro_batch_size(12, 4) == 3
    for global_batch_size, ranks in ((10, 4), (3, 4), (0, 1), (4, 0)):
        with pytest.raises(ConfigError, match=rf"global_batch_size\D*{global_batch_size}\b"):
            largest_micro_batch_size(global_batch_size, ranks)


def test_values_below_one() -> None:
    with pytest.raises(ConfigError, match=r"batch\.global_batch_size \(0\)"):
        micro_batches_per_step(0, 1, 1)
