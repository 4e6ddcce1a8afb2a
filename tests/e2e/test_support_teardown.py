"""The test machinery leaves nothing running: not after a time-out, and not when the tests themselves are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launch import ROOT, clean_environment, run_ranks, torchrun
from tests.support.processes import MARK, family, new_mark
from tests.support.slurm import why_unavailable

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60)]

_HANG = """
import subprocess, sys, time
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
print("child", child.pid, flush=True)
time.sleep(300)
"""
_OWNER = """
import os, sys, time
from tests.support.{module} import {function}
with {function}() as server:
    print(os.getpid(), {handle}, flush=True)
    time.sleep(300)
"""


@pytest.mark.parametrize("launch", [run_ranks, torchrun])
def test_a_time_out_ends_ranks_and_their_children(launch: Callable[..., object], tmp_path: Path) -> None:
    script = tmp_path / "hang.py"
    script.write_text(_HANG)
    result = launch([str(script)], processes=2, timeout_seconds=8)
    children = [int(line.split()[1]) for line in result.output.splitlines() if line.startswith("child")]  # type: ignore[attr-defined]
    assert result.timed_out  # type: ignore[attr-defined]
    assert len(children) == 2
    assert not [child for child in children if _alive(child)]
    with pytest.raises(AssertionError, match="took too long"):
        result.check()  # type: ignore[attr-defined]


def test_one_failing_rank_ends_the_others_at_once(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text("import os, sys, time\nsys.exit('I fail') if os.environ['RANK'] == '1' else time.sleep(300)\n")
    result = run_ranks([str(script)], processes=2, timeout_seconds=30)
    assert not result.timed_out and result.seconds < 20
    with pytest.raises(AssertionError, match="I fail"):
        result.check()


@pytest.mark.s3
def test_the_s3_server_dies_with_its_owner() -> None:
    mark = new_mark()
    _kill_owner(_OWNER.format(module="s3_server", function="s3_server", handle="server.port"), mark)
    assert _gone(lambda: [pid for pid in family(mark) if _alive(pid)])


@pytest.mark.slurm
def test_the_slurm_cluster_dies_with_its_owner() -> None:
    if reason := why_unavailable():
        pytest.skip(reason)
    root = _kill_owner(_OWNER.format(module="slurm", function="slurm_cluster", handle="server.root"), new_mark())
    files = lambda: [f for f in Path("/proc").glob("[0-9]*/fd/*") if _target(f).startswith(root + "/")]  # noqa: E731
    assert _gone(files)
    subprocess.run(["rm", "-r", root], check=True)


def _kill_owner(program: str, mark: str) -> str:
    """Run `program` until it prints "pid word", kill it without warning, return the word."""
    with subprocess.Popen(
        [sys.executable, "-c", program], env=clean_environment({MARK: mark}), cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid, word = owner.stdout.readline().split()
        os.kill(int(pid), signal.SIGKILL)
    return word


def _gone(what: Callable[[], list[object]]) -> bool:
    deadline = time.monotonic() + 10
    while what() and time.monotonic() < deadline:
        time.sleep(0.1)
    return not what()


def _alive(pid: int) -> bool:
    """It runs; a zombie that nobody reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""
