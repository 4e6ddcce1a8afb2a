"""Which steps count, and when a run goes back."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import pytest

from pretrain.config.schema import GuardConfig
from pretrain.train.guards import MIN_STEPS, RewindError, StepGuard


class Result:
    """The part of a `StepResult` that the guard reads."""

    def __init__(self, loss: float = 1.0, norm: float = 1.0, *, is_updated: bool = True) -> None:
        self.losses, self.grad_norm, self.is_updated = {"total": loss}, norm, is_updated


def add(guard: StepGuard, position: int, **result: Any) -> None:
    guard.add(Result(**result), before=position, after=position + 8)  # type: ignore[arg-type]


def test_steps_in_a_row_without_an_update() -> None:
    guard = StepGuard(GuardConfig(max_skipped_steps=3))
    for position in (0, 8):
        add(guard, position, is_updated=False)
        assert not guard.is_good
    add(guard, 16)
    assert guard.is_good
    for position in (24, 32):
        add(guard, position, is_updated=False)
    with pytest.raises(RewindError, match="3 steps in a row") as raised:
        add(guard, 40, is_updated=False)
    assert (raised.value.first, raised.value.end) == (24, 48)


def test_0_never_goes_back() -> None:
    guard = StepGuard(GuardConfig(max_skipped_steps=0))
    for position in range(0, 800, 8):
        add(guard, position, is_updated=False)


def test_limits_of_spikes() -> None:
    generator = random.Random(1)
    losses = [5 + generator.gauss(0, 0.1) for _ in range(300)]
    guard = StepGuard(GuardConfig(spike_zscore=6, spike_window=200))
    for index, loss in enumerate(losses):
        if index < MIN_STEPS:
            assert guard.limits() == (math.inf, math.inf)
        add(guard, 8 * index, loss=loss, norm=2 * loss)
    # Close to mean and standard deviation of the last 200 steps, as the values are normal.
    last = losses[-200:]
    expected = statistics.mean(last) + 6 * statistics.stdev(last)
    limits = guard.limits()
    assert limits.loss == pytest.approx(expected, rel=0.03)
    assert limits.grad_norm == pytest.approx(2 * expected, rel=0.03)

    # Skipped steps do not count: a single outlier would otherwise raise the limits.
    add(guard, 2400, loss=1e9, norm=math.inf, is_updated=False)
    assert guard.limits() == limits
    assert StepGuard(GuardConfig()).limits() == (math.inf, math.inf)


def test_constant_losses_have_a_limit_above_them() -> None:
    guard = StepGuard(GuardConfig(spike_zscore=4))
    for index in range(60):
        add(guard, 8 * index, loss=2.0)
    assert 2.05 < guard.limits().loss < 2.2
