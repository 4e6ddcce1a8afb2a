"""Runs a script in several local processes with a timeout, and ends all of them afterwards.

    arguments = ["-m", "pretrain", "train", "run.yaml", "--out", "run"]
    torchrun(arguments, processes=2, timeout_seconds=60).check()

Each process uses one thread: the tests share few cores, and sums are reproducible.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.support.ports import free_ports
from tests.support.processes import PROCESS_TAG, end_tagged_processes, new_process_tag

ROOT = Path(__file__).resolve().parents[2]
"""Root of the repository; the default working directory of launched processes."""


@dataclass(frozen=True, kw_only=True)
class LaunchResult:
    """Result of a launch."""

    command: tuple[str, ...]
    """The command line."""
    returncodes: tuple[int, ...]
    """Exit status of each process (one for torchrun, one per rank for `run_ranks`)."""
    output: str
    """Standard output and standard error of all processes, interleaved."""
    seconds: float
    """Wall time."""
    timed_out: bool
    """Whether the processes were killed after the timeout."""

    def check(self) -> LaunchResult:
        """Return self, or raise AssertionError with the end of the output."""
        if self.timed_out or any(self.returncodes):
            how = "timed out" if self.timed_out else f"exited with {self.returncodes}"
            raise AssertionError(
                f"{' '.join(self.command)} {how} after {self.seconds:.1f} s; end of its output:\n"
                f"{self.output[-6000:]}"
            )
        return self


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without variables of ranks and jobs, for one CPU thread, plus
    `extra`."""
    launcher_prefixes = ("SLURM_", "SBATCH_", "TORCHELASTIC_", "PMI_")
    rank_variables = {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NODE_RANK",
    }
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(launcher_prefixes) and key not in rank_variables
    }
    search_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    defaults = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": search_path}
    return kept | defaults | dict(extra or {})


def torchrun(
    arguments: Sequence[str],
    *,
    processes: int,
    timeout_seconds: float,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> LaunchResult:
    """`torchrun --nproc-per-node PROCESSES ARGUMENTS` on a free master port.

    Args:
        arguments: A script and its arguments, or `-m module ...`.
        processes: Number of ranks.
        timeout_seconds: All processes are killed after this time.
        env: Variables to add to `clean_environment()`.
        cwd: Working directory.
    """
    command = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=1",
            f"--nproc-per-node={processes}",
        ),
        *("--master-addr=127.0.0.1", f"--master-port={free_ports(1)[0]}", *arguments),
    ]
    return _run([command], [clean_environment(env)], timeout_seconds, cwd)


def run_ranks(
    arguments: Sequence[str],
    *,
    processes: int,
    timeout_seconds: float,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> LaunchResult:
    """`python ARGUMENTS` for each rank with torchrun's variables; starts faster than torchrun.

    If a rank fails, the others are killed; see `torchrun` for the arguments.
    """
    command = [sys.executable, *arguments]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    base = clean_environment(env) | shared
    ranks = [base | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return _run([command] * processes, ranks, timeout_seconds, cwd)


def _run(
    commands: list[list[str]], environments: list[dict[str, str]], timeout_seconds: float, cwd: Path
) -> LaunchResult:
    tag, started = new_process_tag(), time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            children = [
                _start(command, environment | {PROCESS_TAG: tag}, cwd, output)
                for command, environment in zip(commands, environments, strict=True)
            ]
            timed_out = not _wait_for(children, started + timeout_seconds)
        finally:
            end_tagged_processes(tag)
        returncodes = tuple(child.wait() for child in children)
        output.seek(0)
        text = output.read().decode(errors="replace")
    seconds = time.monotonic() - started
    return LaunchResult(
        command=tuple(commands[0]),
        returncodes=returncodes,
        output=text,
        seconds=seconds,
        timed_out=timed_out,
    )


def _start(
    command: list[str], environment: dict[str, str], cwd: Path, output: IO[bytes]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _wait_for(children: list[subprocess.Popen[bytes]], deadline: float) -> bool:
    """Wait until all processes exited or one failed; False if the deadline passed first."""
    while time.monotonic() < deadline:
        codes = [child.poll() for child in children]
        if None not in codes or any(codes):
            return True
        time.sleep(0.02)
    return False
