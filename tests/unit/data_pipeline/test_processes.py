"""Work in several processes: order of results, environment of workers, and number of CPUs."""

from __future__ import annotations

import os
import signal
import time

import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.processes import map_in_processes, parse_part, usable_cpus


def _sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def _process_state(name: str) -> tuple[str, str, bool, int]:
    import cv2

    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    return os.environ.get(name, ""), os.environ["OMP_NUM_THREADS"], ignored, cv2.getNumThreads()


def _fail(job: int) -> int:
    if job == 3:
        raise DataError("the third", slug="third")
    return job


@pytest.mark.parametrize("workers", [0, 2])
def test_results_in_order_or_as_completed(workers: int) -> None:
    jobs = [0.6, 0.0, 0.01, 0.02]
    assert list(map_in_processes(_sleep, jobs, workers)) == list(enumerate(jobs))
    results = list(map_in_processes(_sleep, iter(jobs), workers, ordered=False))
    assert sorted(results) == list(enumerate(jobs))
    assert (results[0] == (0, 0.6)) == (workers == 0)


def test_environment_of_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for value in ("first", "renewed"):  # the fork server is already running for the second one
        monkeypatch.setenv("AWS_SESSION_TOKEN", value)
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        results = list(map_in_processes(_process_state, ["AWS_SESSION_TOKEN"], 1))
        assert results == [(0, (value, "1", True, 1))]


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_errors_are_raised_in_the_parent(workers: int, ordered: bool) -> None:
    with pytest.raises(DataError, match="the third"):
        list(map_in_processes(_fail, range(9), workers, ordered=ordered))


def test_jobs_are_consumed_lazily() -> None:
    consumed: list[int] = []

    def jobs() -> object:
        for number in range(50):
            consumed.append(number)
            yield number / 1e6

    results = map_in_processes(_sleep, jobs(), 1)  # type: ignore[arg-type]
    assert next(results) == (0, 0.0)
    assert len(consumed) <= 4
    results.close()  # type: ignore[attr-defined]


def test_usable_cpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    for requested, cpus in (("", 6), ("4", 4), ("9", 6), ("0", 6), ("many", 6)):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", requested)
        assert usable_cpus() == cpus


def test_parse_part() -> None:
    assert parse_part("2/8") == (2, 8)
    for text in ("8/8", "1", "a/b", "-1/2"):
        with pytest.raises(ConfigError, match="give I/N"):
            parse_part(text)
