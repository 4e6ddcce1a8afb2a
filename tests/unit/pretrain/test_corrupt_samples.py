"""When corrupt samples stop a run."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.common.errors import DataError
from data_pipeline.samples import Batch, SampleProblem
from pretrain.train.corrupt_samples import CorruptSampleGuard, empty_batch_error
from pretrain.train.metrics import RankReport


def report(corrupt: int) -> list[RankReport]:
    problems = tuple(
        SampleProblem("shard.tar", f"k{index}", "unreachable", "no response")
        for index in range(corrupt)
    )
    return [
        RankReport(
            wait_seconds=0,
            memory_gib=0,
            problems=problems,
            filtered={},
            read=(),
            skipped=(),
            truncated=0,
        )
    ]


def test_ratio_since_the_start() -> None:
    guard = CorruptSampleGuard(0.01, samples_read=5_000)
    guard.add(report(99), samples_read=5_100)  # fewer than MIN_CORRUPT
    with pytest.raises(DataError, match=r"100 of 200 samples .*0\.01.*shard\.tar, sample 'k0'"):
        guard.add(report(1), samples_read=5_200)


def test_a_small_ratio_never_stops_a_run() -> None:
    guard = CorruptSampleGuard(0.01, samples_read=0)
    for window in range(1, 200):
        guard.add(report(10), samples_read=1_000 * window)


def test_outage_in_a_long_run_is_detected_quickly() -> None:
    guard = CorruptSampleGuard(0.01, samples_read=0)
    samples_read = 10**9
    guard.add(report(0), samples_read=samples_read)
    with pytest.raises(DataError, match=r"recently read samples were corrupt, more than 0\.5"):
        for _ in range(20):  # 1 % of 10^9 would be 10^7 samples, 2,440 of these windows
            samples_read += 4_096
            guard.add(report(4_096), samples_read=samples_read)
    assert samples_read <= 10**9 + 20_000


def test_one_corrupt_window_is_not_an_outage() -> None:
    """A missing shard: 30 % of one window, but few of all samples."""
    guard = CorruptSampleGuard(0.01, samples_read=0)
    for window in range(1, 400):
        guard.add(report(300 if window == 350 else 0), samples_read=1_000 * window)


def test_all_samples_may_be_allowed() -> None:
    guard = CorruptSampleGuard(1.0, samples_read=0)
    for window in range(1, 50):
        guard.add(report(1_000), samples_read=1_000 * window)


def test_error_of_an_empty_global_batch() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    problems = (SampleProblem("s", "a", "filter:score", ""),) * 3 + (
        SampleProblem("s", "b", "corrupt-image", ""),
    )
    batch = Batch(torch.zeros(0, 3, 8, 8), empty, empty, empty, empty, (), (), problems, 0.0)
    text = str(empty_batch_error(7, [batch, batch]))
    assert "step 7" in text and "filter:score 6, corrupt-image 2" in text
    assert "data.filters" in text and "corrupt_samples.jsonl" in text
