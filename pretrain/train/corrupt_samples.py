"""Stops a run when too many samples are corrupt."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

from data_pipeline.common.errors import DataError
from data_pipeline.common.escaping import escape_control
from data_pipeline.samples import Batch, SampleProblem
from pretrain.train.metrics import RankReport


class UnusableDataError(DataError):
    """Too many samples are corrupt or filtered; raised on every rank in the same step."""


class _WindowCounts(NamedTuple):
    """Number of samples between two log entries, over all ranks."""

    read: int
    corrupt: int
    first: str
    """Description of the first corrupt sample; empty if there is none."""


class CorruptSampleGuard:
    """Counts the corrupt samples of all ranks and raises when their ratio is too high.

    Two ratios are limited: that of all samples since the start, and that of recently read samples,
    because in a long run the first would exceed its limit only days after a storage outage. The
    result is the same on every rank.
    """

    MIN_CORRUPT = 100
    """Number of corrupt samples below which no ratio is checked."""
    RECENT_SAMPLES = 10_000
    """Minimum number of samples that count as recent, rounded up to whole log entries."""

    def __init__(self, max_ratio: float, *, samples_read: int) -> None:
        self._max_ratio, self._samples_at_start = max_ratio, samples_read
        self._samples_read, self._corrupt, self._first = samples_read, 0, ""
        self._recent: deque[_WindowCounts] = deque()

    def add(self, reports: list[RankReport], *, samples_read: int) -> None:
        """Count the corrupt samples since the last log entry.

        Args:
            reports: The reports of all ranks.
            samples_read: Samples read since the start of training, over all ranks.

        Raises:
            DataError: At least `MIN_CORRUPT` samples were corrupt, and they are more than the
                allowed ratio of all samples, or more than half (or the allowed ratio, if that is
                larger) of recently read samples.
        """
        problems = [problem for report in reports for problem in report.problems]
        first = _describe(problems[0]) if problems else ""
        self._first = self._first or first
        self._corrupt += len(problems)
        self._recent.append(_WindowCounts(samples_read - self._samples_read, len(problems), first))
        self._samples_read = samples_read
        while sum(window.read for window in list(self._recent)[1:]) >= self.RECENT_SAMPLES:
            self._recent.popleft()

        total = _WindowCounts(samples_read - self._samples_at_start, self._corrupt, self._first)
        self._check(total, self._max_ratio, "samples")
        recent = _WindowCounts(
            sum(window.read for window in self._recent),
            sum(window.corrupt for window in self._recent),
            next((window.first for window in self._recent if window.first), ""),
        )
        self._check(recent, max(0.5, self._max_ratio), "recently read samples")

    def _check(self, counts: _WindowCounts, max_ratio: float, noun: str) -> None:
        if counts.corrupt >= self.MIN_CORRUPT and counts.corrupt > max_ratio * counts.read:
            raise UnusableDataError(
                f"{counts.corrupt} of {counts.read} {noun} were corrupt, more than {max_ratio:g} "
                f"(data.max_corrupt_ratio is {self._max_ratio:g}); the first: {counts.first}. All "
                f"are listed in corrupt_samples.jsonl of the run folder. Fix the shards, or "
                f"increase data.max_corrupt_ratio"
            )


def empty_batch_error(step: int, batches: Sequence[Batch]) -> UnusableDataError:
    """The error of a step in which no rank has a single valid sample."""
    reasons = Counter(problem.reason for batch in batches for problem in batch.problems)
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(3))
    return UnusableDataError(
        f"the global batch of step {step} has no valid sample (on this rank: "
        f"{counts or 'no samples read'}); check data.filters and corrupt_samples.jsonl of the run "
        f"folder"
    )


def _describe(problem: SampleProblem) -> str:
    text = f"{problem.shard}, sample {problem.key!r}: {problem.reason}: {problem.detail}"
    return escape_control(text)  # shard contents are untrusted
