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
from typing import IO, Any, NoReturn

from tests.support.launch import ROOT, LaunchResult, clean_environment

CommandRunner = Callable[..., LaunchResult]
"""The function that `command_server` yields."""


@contextmanager
def command_server() -> Iterator[CommandRunner]:
    """Start the server; yields a function that runs one command.

    The function takes the arguments of the command, `timeout_seconds` and `env`, changes of the
    environment (None removes a variable).
    """
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.command_server"],
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
        pid = os.fork()
        if pid == 0:
            _run_command(request)
        replies.write(json.dumps(_wait(pid, request["timeout_seconds"])) + "\n")
        replies.flush()


def _run_command(request: dict[str, Any]) -> NoReturn:
    """Run the command in this process and exit."""
    status = 1  # unless the command, which always exits, gives another one
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
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - printed as the interpreter would do
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pid: int, timeout_seconds: float) -> int:
    """The exit status of a process; after the timeout it is killed, which gives -SIGKILL."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        ended_pid, status = os.waitpid(pid, os.WNOHANG)
        if ended_pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    _serve()
