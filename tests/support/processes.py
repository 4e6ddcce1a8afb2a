"""Finds and ends all descendants of a launched process.

Killing the process group is not enough: torchrun starts each worker in a new session, so workers
survive their launcher. A tag in an environment variable is inherited by every descendant.
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

PROCESS_TAG = "VLMOE_TEST_FAMILY"
"""Environment variable with the tag of a launch."""


def kill_on_stdin_close(command: list[str], cleanup_paths: Iterable[Path] = ()) -> list[str]:
    """Wrap `command` so that it is killed when its standard input closes, and paths are removed.

    Start it with a pipe whose write end only this process has open: then the command is killed even
    if this process is killed.
    """
    remove = shlex.join(["rm", "-rf", "--", *map(str, cleanup_paths)])
    return [
        "sh",
        "-c",
        f'"$@" </dev/null & read -r _; kill -KILL "$!"; wait; {remove}',
        "sh",
        *command,
    ]


def new_process_tag() -> str:
    """A unique value for `PROCESS_TAG`."""
    return uuid.uuid4().hex


def process_environments() -> Iterator[tuple[int, set[str]]]:
    """Id and initial environment (`NAME=value`) of every other process of this user."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # has exited, is a zombie, or belongs to another user
        if int(folder.name) != os.getpid():
            yield int(folder.name), {variable.decode(errors="replace") for variable in variables}


def tagged_processes(tag: str) -> list[int]:
    """Ids of the other processes with this tag."""
    return [
        process
        for process, variables in process_environments()
        if f"{PROCESS_TAG}={tag}" in variables
    ]


def end_tagged_processes(tag: str, *, grace_seconds: float = 3.0) -> list[int]:
    """Send SIGTERM to all processes with the tag, and SIGKILL after `grace_seconds`.

    Returns the ids of the processes that were running at the call.
    """
    first = remaining = tagged_processes(tag)
    deadline = time.monotonic() + grace_seconds
    terminated = False
    while remaining:
        if not terminated:
            _signal(remaining, signal.SIGTERM)
            terminated = True
        elif time.monotonic() > deadline:
            _signal(remaining, signal.SIGKILL)
        time.sleep(0.05)
        remaining = tagged_processes(tag)
    return first


def _signal(process_ids: list[int], number: signal.Signals) -> None:
    for process_id in process_ids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, number)
