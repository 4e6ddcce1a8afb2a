"""Work in several processes: its order, what the processes know, and how many there may be."""

from __future__ import annotations

import os
import signal
import time

import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.processes import in_processes, parse_part, usable_cpus


def _late(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def _facts(name: str) -> tuple[str, str, bool, int]:
    import cv2

    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    return os.environ.get(name, ""), os.environ["OMP_NUM_THREADS"], ignored, cv2.getNumThreads()


def _fail(job: int) -> int:
    if job == 3:
        raise DataError("the third", slug="third")
    return job


@pytest.mark.parametrize("workers", [0, 2])
def test_answers_come_in_order_or_as_they_are_done(workers: int) -> None:
    jobs = [0.6, 0.0, 0.01, 0.02]
    assert list(in_processes(_late, jobs, workers)) == list(enumerate(jobs))
    found = list(in_processes(_late, iter(jobs), workers, ordered=False))
    assert sorted(found) == list(enumerate(jobs))
    assert (found[0] == (0, 0.6)) == (workers == 0)


def test_processes_have_the_credentials_of_now_one_thread_and_leave_ctrl_c_to_their_parent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for value in ("first", "renewed"):  # the fork server has started by the second time
        monkeypatch.setenv("AWS_SESSION_TOKEN", value)
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        assert list(in_processes(_facts, ["AWS_SESSION_TOKEN"], 1)) == [(0, (value, "1", True, 1))]


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_the_work_are_raised_here(workers: int, ordered: bool) -> None:
    with pytest.raises(DataError, match="the third"):
        list(in_processes(_fail, range(9), workers, ordered=ordered))


def test_jobs_are_taken_only_as_they_are_needed() -> None:
    taken: list[int] = []

    def jobs() -> object:
        for number in range(50):
            taken.append(number)
            yield number / 1e6

    answers = in_processes(_late, jobs(), 1)  # type: ignore[arg-type]
    assert next(answers) == (0, 0.0)
    assert len(taken) <= 4
    answers.close()  # type: ignore[attr-defined]


def test_cpus_are_those_of_this_process_and_of_its_slurm_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    for asked, cpus in (("", 6), ("4", 4), ("9", 6), ("0", 6), ("many", 6)):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", asked)
        assert usable_cpus() == cpus


def test_shares_of_the_work() -> None:
    assert parse_part("2/8") == (2, 8)
    for text in ("8/8", "1", "a/b", "-1/2"):
        with pytest.raises(ConfigError, match="give I/N"):
            parse_part(text)
