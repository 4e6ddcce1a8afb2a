"""Starts the ranks of a world on this machine's CPU, takes their answers, and goes on when a cell
ends them.

A cell whose ranks hang or fail is told as such; the cells after it get fresh ranks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain.check.job import AFTER_THE_CASES, Answers, Job, Outcome

WORKER = ("-m", "pretrain.check.worker")
MOST_ENDS = 3
"""So often ranks are started anew after a cell ended them."""
MOST_TOLD = 4
"""Ranks whose last words are shown."""
LAST_WORDS_SECONDS, GRACE_SECONDS = 0.7, 3.0
"""How long ranks have for their last words when one has ended, and for ending when they are asked
to."""

Tell = Callable[[dict[str, Any]], None]


def run_on_this_machine(
    job: Job,
    world_size: int,
    tell: Tell,
    *,
    worker: Sequence[str] = WORKER,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Let `world` new processes do a job.

    Args:
        job: What to do.
        world_size: Ranks, each a process with gloo on CPU.
        tell: Gets every answer as soon as it is there (see `pretrain.check.worker.work`); each case
            has one.
        worker: What Python runs in each rank, before the path of the job.
        variables: Added to the ranks' environment.
    """
    path = Path(job.folder) / f"job-{world_size}.json"
    ends = 0
    while job.first < len(job.cases):
        path.write_text(job.to_json(), encoding="utf-8")
        done, trouble = _one_start(job, path, world_size, tell, worker, dict(variables or {}))
        if trouble is None:
            return
        case, status, reason = trouble
        if case == AFTER_THE_CASES:
            tell({"no_floor": reason})
            return
        if done == len(job.cases):
            tell({"trouble": reason})
            return
        tell({"case": done, "outcome": _without_end(job, done, world_size, status, reason)})
        ends += 1
        job = replace(job, first=done + 1)
        if ends == MOST_ENDS:
            for number in range(job.first, len(job.cases)):
                why = f"not tried: {ends} cells before it ended the ranks"
                tell(
                    {
                        "case": number,
                        "outcome": _without_end(job, number, world_size, "not-run", why),
                    }
                )
            return


Trouble = tuple[int, str, str]
"""Number of the case, status and reason."""


def _one_start(
    job: Job,
    path: Path,
    world_size: int,
    tell: Tell,
    worker: Sequence[str],
    variables: dict[str, str],
) -> tuple[int, Trouble | None]:
    """Start ranks once. How many cases are done then, and what ended the ranks before the last
    one."""
    folder = Path(job.folder)
    for old in (Answers(folder).path, *folder.glob(f"rank-*/{Answers.FILE}")):
        old.unlink(missing_ok=True)
    environments = rank_variables(world_size, variables)
    logs = [(folder / f"rank-{rank:05d}.log").open("wb") for rank in range(world_size)]
    command = [sys.executable, *worker, str(path)]
    children = [
        subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        for env, log in zip(environments, logs, strict=True)
    ]
    told = 0
    moved = time.monotonic()
    try:
        while True:
            codes = [child.poll() for child in children]
            answers = Answers(folder).read()
            for answer in answers[told:]:
                tell(answer)
                moved = time.monotonic()
            told = len(answers)
            silent = time.monotonic() - moved > 2 * job.seconds + 180
            if all(code == 0 for code in codes):
                break
            if silent or any(codes):
                time.sleep(LAST_WORDS_SECONDS)
                codes = [child.poll() for child in children]
                done = job.first + sum("case" in answer for answer in answers)
                return done, _trouble(folder, done, codes, silent)
            time.sleep(0.05)
    finally:
        _end(children)
        for log in logs:
            log.close()
    return len(job.cases), None


def rank_variables(world_size: int, variables: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of each rank: torchrun's variables, CPU only, and a fair share of the
    cores."""
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


def _trouble(folder: Path, done: int, codes: Sequence[int | None], silent: bool) -> Trouble:
    """What ended the ranks: one that ended without a word, else their last words."""
    words = [Answers(folder / f"rank-{rank:05d}").read() for rank in range(len(codes))]
    for rank, (code, said) in enumerate(zip(codes, words, strict=True)):
        if code and not said:
            return (
                done,
                "error",
                f"rank {rank} ended with {code}; its last output: {_end_of_log(folder, rank)}",
            )
    lines = [line for said in words for line in said]
    for status in ("error", "hang"):  # one that failed makes the others wait
        reasons = [line for line in lines if line["status"] == status]
        if reasons:
            told = [line["reason"] for line in reasons[:MOST_TOLD]]
            more = (
                [f"and {len(reasons) - MOST_TOLD} more ranks"] if len(reasons) > MOST_TOLD else []
            )
            return reasons[0]["case"], status, "; ".join(told + more)
    assert silent
    return (
        done,
        "hang",
        f"the ranks said nothing for too long; the last output of rank 0: {_end_of_log(folder, 0)}",
    )


def _end_of_log(folder: Path, rank: int) -> str:
    text = (folder / f"rank-{rank:05d}.log").read_text(encoding="utf-8", errors="replace").strip()
    return text[-1500:] or "none"


def _without_end(
    job: Job, number: int, world_size: int, status: str, reason: str
) -> dict[str, Any]:
    case = job.cases[number]
    return Outcome(
        run=case.run, world_size=world_size, cell=case.cell, status=status, reason=reason
    ).to_json()


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask those that still run to end, then insist."""
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        if child.poll() is None:
            child.terminate()
    for child in children:
        try:
            child.wait(max(0.05, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
