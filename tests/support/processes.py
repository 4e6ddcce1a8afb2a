"""Ends a family of processes for certain.

Killing a process group is not enough: torchrun gives each worker a session of its own, so the
workers survive their launcher. A mark in the environment is inherited by every descendant.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

MARK = "VLMOE_TEST_FAMILY"
"""The variable that all processes of one launch share."""


def tied(command: list[str], leftovers: Iterable[Path] = ()) -> list[str]:
    """`command`, but killed when its standard input closes; then the files `leftovers` are removed.

    Start it with a pipe that only this process holds: then it ends even if this process is killed.
    """
    remove = shlex.join(["rm", "-rf", "--", *map(str, leftovers)])
    return [
        "sh",
        "-c",
        f'"$@" </dev/null & read -r _; kill -KILL "$!"; wait; {remove}',
        "sh",
        *command,
    ]


def new_mark() -> str:
    """A value of `MARK` that no other launch has."""
    return uuid.uuid4().hex


def environments() -> Iterator[tuple[int, set[str]]]:
    """Id of every living process of this user, this one excepted, and the variables it was started
    with."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # ended meanwhile, a zombie, or somebody else's
        if int(folder.name) != os.getpid():
            yield int(folder.name), {variable.decode(errors="replace") for variable in variables}


def family(mark: str) -> list[int]:
    """Ids of the living processes that were started with `MARK=mark`, this one excepted."""
    return [process for process, variables in environments() if f"{MARK}={mark}" in variables]


def end_family(mark: str, *, grace_seconds: float = 3.0) -> list[int]:
    """Ask the whole family to end, then insist. Returns the ids that were still there at the
    call."""
    first = members = family(mark)
    deadline = time.monotonic() + grace_seconds
    asked = False
    while members:
        if not asked:
            _signal(members, signal.SIGTERM)
            asked = True
        elif time.monotonic() > deadline:
            _signal(members, signal.SIGKILL)
        time.sleep(0.05)
        members = family(mark)
    return first


def _signal(process_ids: list[int], number: signal.Signals) -> None:
    for process_id in process_ids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, number)
