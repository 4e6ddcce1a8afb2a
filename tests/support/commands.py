"""Runs many `vlmoe` commands without importing torch for each of them.

    with command_server() as vlmoe:
        result = vlmoe(["train", "tiny", "--out", "run"], timeout_seconds=30)

A server process imports torch and the training code once and forks for each command. The child
behaves like `python -m pretrain` with the given arguments and environment.
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
    """A function that runs one command, given its arguments, `timeout_seconds` and changes of the
    environment (None removes a variable)."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.commands"],
        env=clean_environment(),
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdin is not None and server.stdout is not None
    requests, replies = server.stdin, server.stdout

    def run(
        arguments: Sequence[str],
        *,
        timeout_seconds: float = 60.0,
        env: Mapping[str, str | None] | None = None,
    ) -> LaunchResult:
        return _request(requests, replies, list(arguments), timeout_seconds, dict(env or {}))

    try:
        yield run
    finally:
        requests.close()
        server.wait(timeout=10)
        replies.close()


def _request(
    requests: IO[str],
    replies: IO[str],
    arguments: list[str],
    timeout_seconds: float,
    env: dict[str, str | None],
) -> LaunchResult:
    started = time.monotonic()
    with tempfile.NamedTemporaryFile() as output:
        request = {
            "arguments": arguments,
            "env": env,
            "output": output.name,
            "timeout_seconds": timeout_seconds,
        }
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        status = json.loads(replies.readline())
        text = Path(output.name).read_text(errors="replace")
    return LaunchResult(
        command=("vlmoe", *arguments),
        returncodes=(status,),
        output=text,
        seconds=time.monotonic() - started,
        timed_out=status == -signal.SIGKILL,
    )


def _serve() -> None:
    """Handle requests until standard input closes."""
    import pretrain.evaluate.command
    import pretrain.train.run  # noqa: F401 - imported once for all child processes

    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            _run_command(request)
        replies.write(json.dumps(_wait(process, request["timeout_seconds"])) + "\n")
        replies.flush()


def _run_command(request: dict[str, Any]) -> None:
    """Run the command in this process and exit; never returns."""
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
        sys.argv = ["vlmoe", *request["arguments"]]
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
    """Exit status; the process is killed after the timeout, which gives -SIGKILL."""
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
