"""The split of a step over ranks: exact, or an error that names a value which works."""

from __future__ import annotations

import re

import pytest

from data_pipeline.common.errors import ConfigError
from pretrain.config.batch import plan_batch


@pytest.mark.parametrize(
    ("step", "forward", "ranks", "accumulation"),
    [
        (1, 1, 1, 1),
        (256, 64, 2, 2),
        (256, 256, 1, 1),
        (16384, 256, 8, 8),
        (96, 3, 4, 8),
    ],
)
def test_an_exact_split(step: int, forward: int, ranks: int, accumulation: int) -> None:
    plan = plan_batch(step, forward, ranks)
    assert plan.accumulation_steps == accumulation
    assert (
        plan.micro_batch_size * plan.data_ranks * plan.accumulation_steps
        == plan.global_batch_size
        == step
    )


@pytest.mark.parametrize("step", range(1, 40))
@pytest.mark.parametrize(("forward", "ranks"), [(3, 2), (4, 4), (7, 1)])
def test_never_floors_and_the_named_values_work(step: int, forward: int, ranks: int) -> None:
    if step % (forward * ranks) == 0:
        assert plan_batch(step, forward, ranks).accumulation_steps == step // (forward * ranks)
        return
    with pytest.raises(ConfigError) as caught:
        plan_batch(step, forward, ranks)
    message = str(caught.value)
    nearest = int(re.search(r"batch\.global_batch_size=(\d+)", message)[1])  # type: ignore[index]
    plan_batch(nearest, forward, ranks)
    valid = [n for n in range(1, 200) if n % (forward * ranks) == 0]
    assert abs(nearest - step) == min(abs(n - step) for n in valid)
    other = re.search(r"or batch\.micro_batch_size=(\d+)", message)
    assert (other is not None) == (step % ranks == 0)
    if other:
        plan_batch(step, int(other[1]), ranks)


def test_nothing_below_one() -> None:
    with pytest.raises(ConfigError, match="must all be at least 1"):
        plan_batch(0, 1, 1)
