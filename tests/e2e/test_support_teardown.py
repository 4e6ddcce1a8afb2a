"""The test machinery leaves nothing running: not after a time-out, and not when the tests
themselves are killed."""

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
from tests.support.processes import MARK, family, new_mark
from tests.support.slurm import why_unavailable

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60)]

_HANG = """\
import subprocess, sys, time

child = subprocess.Popen(["sleep", "300"], start_new_session=True)
sys.stdout.write(f"child {child.pid}\\n")  # in one piece: the ranks share the file
sys.stdout.flush()
time.sleep(300)
"""
_OWNER = """\
import os, time
from tests.support.{module} import {function}
with {function}() as server:
    print(os.getpid(), {handle}, flush=True)
    time.sleep(300)
"""


@pytest.mark.parametrize(("launch", "timeout_seconds"), [(run_ranks, 2), (torchrun, 10)])
def test_a_time_out_ends_ranks_and_their_children(
    launch: Callable[..., LaunchResult], timeout_seconds: float, tmp_path: Path
) -> None:
    script = tmp_path / "hang.py"
    script.write_text(_HANG)
    result = launch([str(script)], processes=2, timeout_seconds=timeout_seconds)
    children = [
        int(line.split()[1]) for line in result.output.splitlines() if line.startswith("child")
    ]
    assert result.timed_out
    assert len(children) == 2
    assert not [child for child in children if _alive(child)]
    with pytest.raises(AssertionError, match="took too long"):
        result.check()


def test_one_failing_rank_ends_the_others_at_once(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text(
        "import os, sys, time\nsys.exit('I fail') if os.environ['RANK'] == '1' else time.sleep(300)\n"
    )
    result = run_ranks([str(script)], processes=2, timeout_seconds=30)
    assert not result.timed_out and result.seconds < 20
    with pytest.raises(AssertionError, match="I fail"):
        result.check()


@pytest.mark.s3
def test_the_s3_server_dies_with_its_owner() -> None:
    mark = new_mark()
    folder = _kill_owner(
        _OWNER.format(module="s3_server", function="s3_server", handle="server.folder"),
        mark,
        running=lambda _: _programs(family(mark)) == ["python", "sh", "weed"],
    )
    assert _soon(lambda: not _programs(family(mark)))
    assert _soon(lambda: not Path(folder).exists())


@pytest.mark.slurm
def test_the_slurm_cluster_dies_with_its_owner() -> None:
    if reason := why_unavailable():
        pytest.skip(reason)
    root = _kill_owner(
        _OWNER.format(module="slurm", function="slurm_cluster", handle="server.root"),
        new_mark(),
        running=lambda root: {"munged", "slurmctld", "slurmd"} <= set(_programs(_holders(root))),
    )
    assert _soon(lambda: not _holders(root))
    shutil.rmtree(root)


def _kill_owner(program: str, mark: str, *, running: Callable[[str], bool]) -> str:
    """Run `program` until it prints "pid word" and `running(word)`; kill it without warning; return
    the word."""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=clean_environment({MARK: mark}),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        pid, word = owner.stdout.readline().split()
        ran = running(word)
        os.kill(int(pid), signal.SIGKILL)
    assert ran, "what should be ended was not there in the first place"
    return word


def _holders(root: str) -> list[int]:
    """Ids of the processes that have files of `root` open."""
    links = Path("/proc").glob("[0-9]*/fd/*")
    return sorted({int(link.parts[2]) for link in links if _target(link).startswith(f"{root}/")})


def _programs(process_ids: list[int]) -> list[str]:
    """Names of their programs, each once: `slurmd` for /usr/sbin/slurmd-wlm."""
    paths = [Path(_target(Path(f"/proc/{process_id}/exe"))) for process_id in process_ids]
    names = {re.sub(r"(?<=python)[\d.]+$|-wlm$", "", path.name) for path in paths if path.name}
    return sorted("sh" if name in ("dash", "bash", "busybox") else name for name in names)


def _soon(reached: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.1)
    return reached()


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
