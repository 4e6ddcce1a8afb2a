"""Decides which steps count, and when a run goes back to its last checkpoint.

A step with a loss or gradient norm that is not finite, or far above those of the last steps, does
not update the weights. After several such steps in a row the run is not going to recover: it goes
back to its last checkpoint and leaves out the data of these steps. All inputs are the same on every
rank, and so are all decisions.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from dataclasses import replace

from data_pipeline.common.tables import counted
from pretrain.checkpoint.reader import load_latest
from pretrain.config.schema import GuardConfig
from pretrain.parallel.errors import TrainingError
from pretrain.train.components import TrainComponents
from pretrain.train.events import EventLog
from pretrain.train.state import TrainState
from pretrain.train.step_result import StepLimits, StepResult

logger = logging.getLogger(__name__)

MIN_STEPS = 50
"""Steps before the limits of spikes apply."""
_MAD_TO_STD = 1.4826
"""Ratio of standard deviation and median absolute deviation of a normal distribution."""
_MIN_RELATIVE_MAD = 0.01
"""Smallest deviation relative to the median, for losses that hardly change."""


class RewindError(Exception):
    """Too many steps in a row were skipped; their samples are at `first` to `end - 1`."""

    def __init__(self, first: int, end: int, steps: int) -> None:
        super().__init__(f"{counted(steps, 'step')} in a row did not update the weights")
        self.first, self.end = first, end


class StepGuard:
    """Counts the steps that do not update the weights."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._norms: deque[float] = deque(maxlen=config.spike_window)
        self._in_a_row, self._first = 0, 0

    @property
    def is_good(self) -> bool:
        """Whether the last step updated the weights."""
        return self._in_a_row == 0

    def limits(self) -> StepLimits:
        """Limits of the next step; infinite without enough steps or with `guard.spike_zscore` 0."""
        if not self._config.spike_zscore or len(self._losses) < MIN_STEPS:
            return StepLimits()
        zscore = self._config.spike_zscore
        return StepLimits(_limit(self._losses, zscore), _limit(self._norms, zscore))

    def add(self, result: StepResult, *, before: int, after: int) -> None:
        """Count a step whose samples are at positions `before` to `after - 1`.

        Raises:
            RewindError: It is one of `guard.max_skipped_steps` in a row without an update.
        """
        if result.is_updated:
            self._in_a_row = 0
            self._losses.append(result.losses["total"])
            self._norms.append(result.grad_norm)
            return
        self._first = before if self.is_good else self._first
        self._in_a_row += 1
        if self._in_a_row == self._config.max_skipped_steps:
            raise RewindError(self._first, after, self._in_a_row)


def _limit(values: deque[float], zscore: float) -> float:
    """Median plus `zscore` robust standard deviations."""
    median = statistics.median(values)
    deviation = statistics.median(abs(value - median) for value in values)
    return median + zscore * _MAD_TO_STD * max(deviation, _MIN_RELATIVE_MAD * abs(median))


def log_skipped_step(result: StepResult, step: int, events: EventLog) -> None:
    loss, norm = result.losses["total"], result.grad_norm
    logger.warning(
        "step %d did not update the weights: loss %.4g, gradient norm %.4g", step, loss, norm
    )
    events.write("skipped-step", step, loss=_json_number(loss), grad_norm=_json_number(norm))


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def rewind(components: TrainComponents, error: RewindError, num_rewinds: int) -> TrainState:
    """The state of the last checkpoint, which leaves out the data of the skipped steps. Collective.

    Raises:
        TrainingError: There is no checkpoint, or the run went back too often.
    """
    guard = components.run.guard
    if num_rewinds > guard.max_rewinds:
        raise TrainingError(
            f"{error}, and the run already went back to its last checkpoint "
            f"{counted(guard.max_rewinds, 'time')} (guard.max_rewinds); lower optim.lr or "
            f"optim.clip_norm, or look at the data of these steps (positions {error.first:,} to "
            f"{error.end:,}, `vlmoe data order`)"
        )
    resumed = load_latest(components.engine, components.checkpoints)
    if resumed is None:
        raise TrainingError(
            f"{error}, and there is no checkpoint to go back to; lower optim.lr, or extend "
            f"the warm-up (schedule.warmup_steps)"
        )
    state = TrainState.from_json(resumed.state_json["train"])
    logger.warning(
        "%s: the run goes back to %s, without the samples at positions %s to %s",
        error,
        resumed.path,
        f"{error.first:,}",
        f"{error.end:,}",
    )
    return replace(state, loader=state.loader.with_skipped(error.first, error.end))
