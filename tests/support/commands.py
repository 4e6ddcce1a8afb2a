"""Runs the command `vlmoe` many times without waiting for torch each time.

    with command_server() as vlmoe:
        result = vlmoe(["train", "tiny", "--out", "run"], timeout_seconds=30)

A server process imports torch and the training code once; every command is a fork of it that does
what `python -m pretrain` does, with its own arguments, environment, output and exit status.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tests.support.launch import ROOT, LaunchResult, clean_environment

Command = Callable[..., LaunchResult]


@contextmanager
def command_server() -> Iterator[Command]:
    """A function that runs one command, given its words, `timeout_seconds`, and `env` to add (None
    removes)."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.commands"],
        env=clean_environment(),
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdin is not None and server.stdout is not None
    requests, answers = server.stdin, server.stdout

    def run(
        words: Sequence[str],
        *,
        timeout_seconds: float = 60.0,
        env: Mapping[str, str | None] | None = None,
    ) -> LaunchResult:
        return _ask(requests, answers, list(words), timeout_seconds, dict(env or {}))

    try:
        yield run
    finally:
        requests.close()
        server.wait(timeout=10)
        answers.close()


def _ask(
    requests: IO[str],
    answers: IO[str],
    words: list[str],
    timeout_seconds: float,
    env: dict[str, str | None],
) -> LaunchResult:
    started = time.monotonic()
    with tempfile.NamedTemporaryFile() as output:
        request = {
            "words": words,
            "env": env,
            "output": output.name,
            "timeout_seconds": timeout_seconds,
        }
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        status = json.loads(answers.readline())
        text = Path(output.name).read_text(errors="replace")
    return LaunchResult(
        command=("vlmoe", *words),
        returncodes=(status,),
        output=text,
        seconds=time.monotonic() - started,
        timed_out=status == -signal.SIGKILL,
    )


def _serve() -> None:
    """Answer requests until standard input closes."""
    import pretrain.evaluate.command
    import pretrain.train.run  # noqa: F401 - what is imported here need not be by the forks

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            _become(request)
        answers.write(json.dumps(_wait(process, request["timeout_seconds"])) + "\n")
        answers.flush()


def _become(request: dict[str, Any]) -> None:
    """Be the command; never returns."""
    status = 1
    try:
        output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, null), (1, output), (2, output)):
            os.dup2(source, target)
        for name, value in request["env"].items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        sys.argv = ["vlmoe", *request["words"]]
        from pretrain.cli.main import run

        run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - as the interpreter would print it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(process: int, timeout_seconds: float) -> int:
    """Exit status; a process that takes too long is killed and gives that signal's negative
    number."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    _serve()
