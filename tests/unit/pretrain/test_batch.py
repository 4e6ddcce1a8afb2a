"""Batch sizes of a run."""

from __future__ import annotations

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


def test_split_that_is_not_exact() -> None:
    with pytest.raises(ConfigError, match=r"batch\.global_batch_size is 250, .*64.* 2 ranks"):
        plan_batch(250, 64, 2)
