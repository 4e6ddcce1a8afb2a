"""Warns while a run trains: a source of which most samples are skipped, truncated captions."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from data_pipeline.common.escaping import escape_control
from pretrain.config.schema import RunConfig
from pretrain.plan.sample_check import MAX_TRUNCATED_RATIO
from pretrain.train.metrics import RankReport, SourceSize

logger = logging.getLogger(__name__)


class SkippedSampleMonitor:
    """Counts what all ranks skip and truncate, and warns once for each source; used on rank 0.

    A look at some samples before training (`plan/sample_check.py`) does not show what a later part
    of a source loses.
    """

    MIN_SAMPLES = 1_000
    """Number of samples of a source below which no ratio is checked."""

    def __init__(self, sources: Sequence[SourceSize], run: RunConfig) -> None:
        self._names = [source.name for source in sources]
        self._max_skipped = run.data.max_filtered_ratio
        self._context_length = run.model.context_length
        self._read_S = np.zeros(len(sources), dtype=np.int64)
        self._skipped_S = np.zeros(len(sources), dtype=np.int64)
        self._truncated = 0
        self._warned: set[int | str] = set()
        """Indices of sources, and "captions"."""

    def add(self, reports: Sequence[RankReport]) -> None:
        """Add what all ranks reported since the last log entry; warn if a limit is exceeded."""
        for report in reports:
            self._read_S += report.read
            self._skipped_S += report.skipped
            self._truncated += report.truncated
        rows = zip(self._names, self._read_S.tolist(), self._skipped_S.tolist(), strict=True)
        for index, (name, read, skipped) in enumerate(rows):
            if read >= self.MIN_SAMPLES and skipped > self._max_skipped * read:
                self._warn_once(
                    index,
                    f"source {name}: {skipped:,} of {read:,} samples since the start of this job "
                    f"were skipped, more than data.max_filtered_ratio ({self._max_skipped:g}); see "
                    f"data/filtered and data/corrupt in TensorBoard",
                )
        captions = int(self._read_S.sum() - self._skipped_S.sum())
        if captions >= self.MIN_SAMPLES and self._truncated > MAX_TRUNCATED_RATIO * captions:
            self._warn_once(
                "captions",
                f"{self._truncated:,} of {captions:,} captions since the start of this job have "
                f"more than model.context_length ({self._context_length}) tokens and are "
                f"truncated",
            )

    def _warn_once(self, subject: int | str, message: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            logger.warning("%s", escape_control(message))
