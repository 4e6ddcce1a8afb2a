"""The test support leaves no process running, after a timeout or when the tests are killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launch import ROOT, LaunchResult, clean_environment, run_ranks, torchrun
from tests.support.processes import PROCESS_TAG, new_process_tag, tagged_processes
from tests.support.slurm import why_unavailable

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60)]

HANG = """\
import subprocess, sys, time

child = subprocess.Popen(["sleep", "300"], start_new_session=True)
sys.stdout.write(f"child {child.pid}\\n")  # one write: the ranks share the file
sys.stdout.flush()
time.sleep(300)
"""
FAIL_ON_RANK_1 = """\
import os, sys, time

if os.environ["RANK"] == "1":
    sys.exit("rank 1 failed")
time.sleep(300)
"""
START_SERVER = """\
import os, time
from tests.support.{module} import {function}
with {function}() as server:
    print(os.getpid(), server.{folder}, flush=True)
    time.sleep(300)
"""


@pytest.mark.parametrize(("launch", "timeout_seconds"), [(run_ranks, 2), (torchrun, 10)])
def test_timeout_ends_ranks_and_their_children(
    launch: Callable[..., LaunchResult], timeout_seconds: float, tmp_path: Path
) -> None:
    script = tmp_path / "hang.py"
    script.write_text(HANG)
    result = launch([str(script)], processes=2, timeout_seconds=timeout_seconds)
    lines = result.output.splitlines()
    children = [int(line.split()[1]) for line in lines if line.startswith("child")]
    assert result.timed_out
    assert len(children) == 2
    assert not [child for child in children if is_running(child)]
    with pytest.raises(AssertionError):
        result.check()


def test_failed_rank_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text(FAIL_ON_RANK_1)
    result = run_ranks([str(script)], processes=2, timeout_seconds=30)
    assert not result.timed_out and result.seconds < 20
    with pytest.raises(AssertionError, match="rank 1 failed"):
        result.check()


@pytest.mark.s3
def test_s3_server_ends_with_its_parent() -> None:
    tag = new_process_tag()
    folder = start_and_kill_parent(
        START_SERVER.format(module="s3_server", function="s3_server", folder="folder"),
        tag,
        is_ready=lambda _: program_names(tagged_processes(tag)) == ["python", "sh", "weed"],
    )
    assert becomes_true(lambda: not program_names(tagged_processes(tag)))
    assert becomes_true(lambda: not Path(folder).exists())


@pytest.mark.slurm
def test_slurm_cluster_ends_with_its_parent() -> None:
    if reason := why_unavailable():
        pytest.skip(reason)
    programs = {"munged", "slurmctld", "slurmd"}
    root = start_and_kill_parent(
        START_SERVER.format(module="slurm", function="slurm_cluster", folder="root"),
        new_process_tag(),
        is_ready=lambda root: programs <= set(program_names(processes_with_open_files(root))),
    )
    assert becomes_true(lambda: not processes_with_open_files(root))
    shutil.rmtree(root)


def start_and_kill_parent(program: str, tag: str, *, is_ready: Callable[[str], bool]) -> str:
    """Run a Python program that starts a server, and kill it without warning.

    Args:
        program: Prints its process ID and the server's folder.
        tag: Process tag of the program and its children.
        is_ready: Whether the server in this folder is running.

    Returns:
        The server's folder.
    """
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=clean_environment({PROCESS_TAG: tag}),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        process_id, folder = parent.stdout.readline().split()
        was_ready = is_ready(folder)
        os.kill(int(process_id), signal.SIGKILL)
    assert was_ready, "the server was not running"
    return folder


def processes_with_open_files(folder: str) -> list[int]:
    """Ids of the processes that have files in this folder open."""
    links = Path("/proc").glob("[0-9]*/fd/*")
    return sorted({int(link.parts[2]) for link in links if target(link).startswith(f"{folder}/")})


def program_names(process_ids: list[int]) -> list[str]:
    """Sorted distinct program names of the processes: `slurmd` for /usr/sbin/slurmd-wlm."""
    paths = [Path(target(Path(f"/proc/{process_id}/exe"))) for process_id in process_ids]
    names = {re.sub(r"(?<=python)[\d.]+$|-wlm$", "", path.name) for path in paths if path.name}
    return sorted("sh" if name in ("dash", "bash", "busybox") else name for name in names)


def becomes_true(condition: Callable[[], bool]) -> bool:
    """Whether the condition holds within 10 seconds."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def is_running(process_id: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def target(link: Path) -> str:
    """What a symbolic link points to; empty if it cannot be read."""
    try:
        return os.readlink(link)
    except OSError:
        return ""
