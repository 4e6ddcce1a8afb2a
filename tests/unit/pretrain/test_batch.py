"""Split of a step over ranks: exact, or an error with values that are valid."""

from __future__ import annotations

import re

import pytest

from data_pipeline.common.errors import ConfigError
from pretrain.config.batch import plan_batch


@pytest.mark.parametrize(
    ("global_batch_size", "micro_batch_size", "ranks", "accumulation_steps"),
    [
        (1, 1, 1, 1),
        (256, 64, 2, 2),
        (256, 256, 1, 1),
        (16384, 256, 8, 8),
        (96, 3, 4, 8),
    ],
)
def test_exact_split(
    global_batch_size: int, micro_batch_size: int, ranks: int, accumulation_steps: int
) -> None:
    plan = plan_batch(global_batch_size, micro_batch_size, ranks)
    assert plan.accumulation_steps == accumulation_steps
    pairs_per_step = plan.micro_batch_size * plan.data_parallel_size * plan.accumulation_steps
    assert pairs_per_step == plan.global_batch_size == global_batch_size


@pytest.mark.parametrize("global_batch_size", range(1, 40))
@pytest.mark.parametrize(("micro_batch_size", "ranks"), [(3, 2), (4, 4), (7, 1)])
def test_suggested_values_are_valid_and_nearest(
    global_batch_size: int, micro_batch_size: int, ranks: int
) -> None:
    pairs_of_all_ranks = micro_batch_size * ranks
    if global_batch_size % pairs_of_all_ranks == 0:
        plan = plan_batch(global_batch_size, micro_batch_size, ranks)
        assert plan.accumulation_steps == global_batch_size // pairs_of_all_ranks
        return

    with pytest.raises(ConfigError) as error:
        plan_batch(global_batch_size, micro_batch_size, ranks)
    message = str(error.value)
    nearest = int(re.search(r"batch\.global_batch_size=(\d+)", message)[1])  # type: ignore[index]
    plan_batch(nearest, micro_batch_size, ranks)
    distances = [abs(n - global_batch_size) for n in range(1, 200) if n % pairs_of_all_ranks == 0]
    assert abs(nearest - global_batch_size) == min(distances)

    micro = re.search(r"or batch\.micro_batch_size=(\d+)", message)
    assert (micro is not None) == (global_batch_size % ranks == 0)
    if micro:
        plan_batch(global_batch_size, int(micro[1]), ranks)


def test_values_below_one() -> None:
    with pytest.raises(ConfigError, match=r"batch\.global_batch_size \(0\)"):
        plan_batch(0, 1, 1)
