"""When a run saves checkpoints, and what of the training loop they contain."""

from __future__ import annotations

import logging
import time

from data_pipeline.loading.ledger import Ledger
from pretrain.checkpoint.writer import CheckpointWriter
from pretrain.parallel.errors import CheckpointError
from pretrain.train.components import TrainComponents
from pretrain.train.state import TrainState

logger = logging.getLogger(__name__)


class PeriodicCheckpoints:
    """Saves the checkpoints of a run, in the background except for the last one."""

    def __init__(self, components: TrainComponents, ledger: Ledger | None) -> None:
        config = components.run.checkpoint
        self.writer = CheckpointWriter(components.engine, components.checkpoints, keep=config.keep)
        self._ledger, self._tokenizer = ledger, components.tokenizer.fingerprint
        self._seconds = config.every_minutes * 60
        self._last_save = time.monotonic()

    def is_due(self) -> bool:
        """Whether the time since the last checkpoint has passed on this rank."""
        return self._seconds > 0 and time.monotonic() - self._last_save >= self._seconds

    def save(self, state: TrainState, *, last: bool) -> None:
        """Start to save a checkpoint; wait for it if it is the last one. Collective."""
        if self._ledger is not None:
            self._ledger.sync()
        if last:
            try:
                self.writer.finish()
            except CheckpointError as error:  # the last state is saved all the same
                logger.error("%s", error)
        state_json = {"train": state.to_json(), "tokenizer": self._tokenizer}
        self.writer.start(state.step, state_json, in_background=not last)
        if last:
            self.writer.finish()
        self._last_save = time.monotonic()
