"""Starts ranks on this machine's CPU, forwards their messages, and restarts them after a failure.

If a rank fails or hangs, all ranks are terminated, the case is reported with that status, and the
remaining cases run in new processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.common.tables import counted
from pretrain.parity.job import Job, Result, case_message, read_messages

WORKER = ("-m", "pretrain.parity.worker")
MAX_FAILURES = 3
"""After this many failed cases the remaining ones are not run."""
MAX_REPORTED_RANKS = 4
"""Ranks whose failures are shown."""
REPORT_SECONDS, TERMINATE_SECONDS = 0.7, 3.0
"""Time that ranks have to write their messages once one of them has exited, and to exit after
SIGTERM."""

OnMessage = Callable[[dict[str, Any]], None]


class _Failure(NamedTuple):
    status: str
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
            `pretrain.parity.worker.run_job`); there is one message for each case, and
            `{"failure": reason}` if ranks fail after the last case.
        worker: Arguments of the Python interpreter for each rank, before the path of the job.
        variables: Environment variables added for the ranks.
    """

    def report(index: int, status: str, reason: str) -> None:
        result = Result(case=job.cases[index], world_size=world_size, status=status, reason=reason)
        on_message(case_message(index, result))

    for _ in range(MAX_FAILURES):
        environments = rank_variables(world_size, variables or {})
        done, failure = _run_once(job, worker, environments, on_message)
        if failure is None:
            return
        if done == len(job.cases):
            is_optional = failure.status == "no-float64"
            key = "no_float64_reference" if is_optional else "failure"
            on_message({key: failure.reason})
            return

        report(done, *failure)
        job = replace(job, first=done + 1)
        if job.first == len(job.cases):
            return

    for index in range(job.first, len(job.cases)):
        report(index, "not-run", f"not run: {MAX_FAILURES} earlier cases failed or hung")


def _run_once(
    job: Job,
    worker: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    on_message: OnMessage,
) -> tuple[int, _Failure | None]:
    """Start the ranks once.

    Returns:
        The number of finished cases, and the failure that ended the ranks early, if any.
    """
    path = Path(job.folder) / "job.json"
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    for rank in range(len(environments)):
        job.messages_path(rank).unlink(missing_ok=True)

    inbox = _Inbox(job, on_message)
    with _processes([*worker, str(path)], environments, Path(job.folder)) as processes:
        while True:
            codes = [process.poll() for process in processes]
            inbox.forward()
            if all(code == 0 for code in codes):
                if inbox.done < len(job.cases):
                    reason = f"the ranks exited with status 0 after {counted(inbox.done, 'case')}"
                    return inbox.done, _Failure("error", reason)
                return inbox.done, None
            is_silent = time.monotonic() - inbox.last > 2 * job.seconds + 180
            if is_silent or any(codes):
                time.sleep(REPORT_SECONDS)
                inbox.forward()  # a result that was written meanwhile
                codes = [process.poll() for process in processes]
                return inbox.done, _find_failure(job, codes)
            time.sleep(0.05)


class _Inbox:
    """The results that rank 0 writes."""

    def __init__(self, job: Job, on_message: OnMessage) -> None:
        self._path, self._on_message, self._count = job.messages_path(0), on_message, 0
        self.done = job.first
        """Number of finished cases."""
        self.last = time.monotonic()
        """When the last message was read."""

    def forward(self) -> None:
        """Call `on_message` with new results."""
        for message in read_messages(self._path)[self._count :]:
            self._count, self.last = self._count + 1, time.monotonic()
            if "failure" not in message:
                self._on_message(message)
                self.done += "case" in message


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


def _find_failure(job: Job, codes: Sequence[int | None]) -> _Failure:
    """The cause: a rank that exited without a message, otherwise the messages of the ranks."""
    failures = []
    for rank, code in enumerate(codes):
        messages = read_messages(job.messages_path(rank))
        own = [message for message in messages if "failure" in message]
        if code and not own:
            reason = f"rank {rank} exited with status {code}; its last output: "
            return _Failure("error", reason + _end_of_log(job, rank))
        failures += own

    if failures:
        # The first one is the cause: the others lose their connection to it, or wait for it.
        failures.sort(key=lambda message: float(message["time"]))
        reasons = [str(message["reason"]) for message in failures]
        hidden = len(reasons) - MAX_REPORTED_RANKS
        more = [f"and {hidden} more ranks"] if hidden > 0 else []
        return _Failure(failures[0]["failure"], "; ".join(reasons[:MAX_REPORTED_RANKS] + more))
    reason = "no rank reported progress for too long; the last output of rank 0: "
    return _Failure("hang", reason + _end_of_log(job, 0))


def _log_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.log"


def _end_of_log(job: Job, rank: int) -> str:
    text = _log_path(Path(job.folder), rank).read_text(encoding="utf-8", errors="replace").strip()
    return text[-1500:] or "none"


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
