"""Starts ranks on this machine's CPU, forwards their messages, and restarts them after a failure.

If a rank fails or hangs, all ranks are terminated, the case is reported with that status, and the
remaining cases run in new processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.parity.job import AFTER_ALL_CASES, Job, MessageLog, Result

WORKER = ("-m", "pretrain.parity.worker")
MAX_FAILURES = 3
"""After this many failed cases the remaining ones are not run."""
MAX_REPORTED_RANKS = 4
"""Ranks whose error reports are shown."""
REPORT_SECONDS, TERMINATE_SECONDS = 0.7, 3.0
"""Time that ranks have to write their error reports once one of them has exited, and to exit after
SIGTERM."""

OnMessage = Callable[[dict[str, Any]], None]


class RankFailure(NamedTuple):
    """Why ranks exited before all cases were done."""

    case: int
    """Index of the case in the rank's error report, or `AFTER_ALL_CASES`."""
    status: str
    """`error` or `hang`."""
    reason: str


def launch_local_ranks(
    job: Job,
    world_size: int,
    on_message: OnMessage,
    *,
    worker: Sequence[str] = WORKER,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Run a job in `world_size` new processes.

    Args:
        job: The cases.
        world_size: Number of ranks, each a process with gloo on CPU.
        on_message: Called with every message as soon as it is written (see
            `pretrain.parity.worker.run_job`); there is one message for each case.
        worker: Arguments of the Python interpreter for each rank, before the path of the job.
        variables: Environment variables added for the ranks.
    """
    path = Path(job.folder) / f"job-{world_size}.json"
    failures = 0
    while job.first < len(job.cases):
        path.write_text(job.to_json(), encoding="utf-8")
        done, failure = _run_once(
            job, [*worker, str(path)], rank_variables(world_size, variables or {}), on_message
        )
        if failure is None:
            return
        if failure.case == AFTER_ALL_CASES:
            on_message({"float32_error_unavailable": failure.reason})
            return
        if done == len(job.cases):
            on_message({"rank_failure": failure.reason})
            return

        on_message(_failed_case(job, done, world_size, failure.status, failure.reason))
        failures += 1
        job = replace(job, first=done + 1)
        if failures == MAX_FAILURES:
            reason = f"not run: {failures} earlier cases failed or hung"
            for index in range(job.first, len(job.cases)):
                on_message(_failed_case(job, index, world_size, "not-run", reason))
            return


def _run_once(
    job: Job,
    arguments: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    on_message: OnMessage,
) -> tuple[int, RankFailure | None]:
    """Start the ranks once.

    Returns:
        The number of finished cases, and the failure that ended the ranks early, if any.
    """
    folder = Path(job.folder)
    for old in (MessageLog(folder).path, *folder.glob(f"rank-*/{MessageLog.FILE}")):
        old.unlink(missing_ok=True)

    with _processes(arguments, environments, folder) as processes:
        num_forwarded, last_message = 0, time.monotonic()
        while True:
            codes = [process.poll() for process in processes]
            messages = MessageLog(folder).read()
            for message in messages[num_forwarded:]:
                on_message(message)
                last_message = time.monotonic()
            num_forwarded = len(messages)

            if all(code == 0 for code in codes):
                return len(job.cases), None
            is_silent = time.monotonic() - last_message > 2 * job.seconds + 180
            if is_silent or any(codes):
                time.sleep(REPORT_SECONDS)
                codes = [process.poll() for process in processes]
                done = job.first + sum("case" in message for message in messages)
                return done, _find_failure(folder, done, codes, is_silent)
            time.sleep(0.05)


@contextmanager
def _processes(
    arguments: Sequence[str], environments: Sequence[Mapping[str, str]], folder: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One Python process per environment, terminated at the end; output goes to log files."""
    logs = [_log_path(folder, rank).open("wb") for rank in range(len(environments))]
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for env, log in zip(environments, logs, strict=True)
    ]
    try:
        yield processes
    finally:
        _terminate(processes)
        for log in logs:
            log.close()


def rank_variables(world_size: int, variables: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of each rank: torchrun's variables, no GPU, an equal number of threads."""
    from pretrain.parallel.environment import free_port

    threads = max(1, (os.cpu_count() or 1) // world_size)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    } | dict(variables)
    return [
        dict(os.environ) | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(world_size)
    ]


def _find_failure(
    folder: Path, done: int, codes: Sequence[int | None], is_silent: bool
) -> RankFailure:
    """The cause: a rank that exited without an error report, otherwise the error reports."""
    reports_by_rank = [MessageLog(folder / f"rank-{rank:05d}").read() for rank in range(len(codes))]
    for rank, (code, reports) in enumerate(zip(codes, reports_by_rank, strict=True)):
        if code and not reports:
            reason = f"rank {rank} exited with status {code}; its last output: "
            return RankFailure(done, "error", reason + _end_of_log(folder, rank))

    reports = [report for rank_reports in reports_by_rank for report in rank_reports]
    for status in ("error", "hang"):  # errors first: a failed rank makes the others hang
        matching = [report for report in reports if report["status"] == status]
        if matching:
            reasons = [report["reason"] for report in matching[:MAX_REPORTED_RANKS]]
            if len(matching) > MAX_REPORTED_RANKS:
                reasons.append(f"and {len(matching) - MAX_REPORTED_RANKS} more ranks")
            return RankFailure(matching[0]["case"], status, "; ".join(reasons))

    assert is_silent
    reason = "no rank reported progress for too long; the last output of rank 0: "
    return RankFailure(done, "hang", reason + _end_of_log(folder, 0))


def _log_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.log"


def _end_of_log(folder: Path, rank: int) -> str:
    text = _log_path(folder, rank).read_text(encoding="utf-8", errors="replace").strip()
    return text[-1500:] or "none"


def _failed_case(job: Job, index: int, world_size: int, status: str, reason: str) -> dict[str, Any]:
    """The message for a case that the ranks did not finish."""
    result = Result(case=job.cases[index], world_size=world_size, status=status, reason=reason)
    return {"case": index, "result": result.to_json()}


def _terminate(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to all running processes, then SIGKILL."""
    deadline = time.monotonic() + TERMINATE_SECONDS
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(max(0.05, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
