"""When damage ends a run: by its share since the start, by what came lately, and never for a few
samples."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.common.errors import DataError
from data_pipeline.samples import Batch, SampleProblem
from pretrain.train.metrics import BadSamples, RankReport, nothing_left


def report(bad: int) -> list[RankReport]:
    problems = tuple(
        SampleProblem("shard.tar", f"k{number}", "unreachable", "no answer")
        for number in range(bad)
    )
    return [RankReport(wait_seconds=0, memory_gib=0, problems=problems, filtered={})]


def test_the_share_since_the_start() -> None:
    bad = BadSamples(0.01, read=5_000)
    bad.add(report(99), read=5_100)  # a few are no verdict
    with pytest.raises(DataError, match=r"100 of 200 samples were bad, more than 0.01"):
        bad.add(report(1), read=5_200)


def test_a_small_share_never_ends_a_run() -> None:
    bad = BadSamples(0.01, read=0)
    for window in range(1, 200):
        bad.add(report(10), read=1_000 * window)


def test_a_long_run_notices_soon_that_nothing_comes_any_more() -> None:
    bad = BadSamples(0.01, read=0)
    read = 10**9
    bad.add(report(0), read=read)
    with pytest.raises(DataError, match=r"samples read lately were bad, more than 0\.5"):
        for _ in range(20):  # 1 % of 10^9 would be 10^7 samples, 2,440 windows of these
            read += 4_096
            bad.add(report(4_096), read=read)
    assert read <= 10**9 + 20_000


def test_damage_that_lies_together_is_no_outage() -> None:
    """A missing shard in a small window: a third of some windows, and little of everything."""
    bad = BadSamples(0.01, read=0)
    for window in range(1, 400):
        bad.add(report(300 if window == 350 else 0), read=1_000 * window)


def test_a_user_may_allow_all() -> None:
    bad = BadSamples(1.0, read=0)
    for window in range(1, 50):
        bad.add(report(1_000), read=1_000 * window)


def test_a_step_with_nothing_says_why() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    problems = (SampleProblem("s", "a", "filter:score", ""),) * 3 + (
        SampleProblem("s", "b", "bad-image", ""),
    )
    batch = Batch(torch.zeros(0, 3, 8, 8), none, none, none, none, (), (), problems, 0.0)
    with pytest.raises(
        DataError, match=r"global batch of step 7 .* filter:score 6, bad-image 2\); look"
    ):
        raise nothing_left(7, [batch, batch])
