"""Only one process trains in a run folder; its lock ends with the process, also if it is killed."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.common.errors import StorageError
from pretrain.train.run_lock import LOCK_FILE, lock_run_folder
from tests.support.launch import ROOT

HOLD = """
import os, sys, time
from pathlib import Path
from pretrain.train.run_lock import lock_run_folder
lock = lock_run_folder(Path(sys.argv[1]))
child = os.fork()
if not child:
    time.sleep(60)
    os._exit(0)
print(os.getpid(), child, flush=True)
time.sleep(60)
"""
"""Holds the lock and has a child process, as a training has loader workers."""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds the lock, and its child."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    child = int(process.stdout.readline().split()[1])
    yield process, child
    process.kill()
    subprocess.run(["kill", "-9", str(child)], check=False)
    process.communicate()


@pytest.mark.timeout(60)
def test_a_second_training_in_a_run_folder_is_refused(
    tmp_path: Path, holder: tuple[subprocess.Popen[str], int]
) -> None:
    process, _ = holder
    for _ in range(2):  # the refused start leaves the lock as it is
        with pytest.raises(StorageError, match=rf"in use by process {process.pid} on .*--out"):
            lock_run_folder(tmp_path, wait_seconds=0.1)
    process.kill()
    process.wait()  # its child is still running
    with lock_run_folder(tmp_path, wait_seconds=5):
        assert str(process.pid) not in (tmp_path / LOCK_FILE).read_text()


@pytest.mark.timeout(60)
def test_the_lock_of_a_lost_computer_can_be_deleted(
    tmp_path: Path, holder: tuple[subprocess.Popen[str], int]
) -> None:
    with pytest.raises(StorageError, match=f"delete {tmp_path / LOCK_FILE}"):
        lock_run_folder(tmp_path, wait_seconds=0)
    (tmp_path / LOCK_FILE).unlink()
    lock_run_folder(tmp_path, wait_seconds=0).close()


def test_file_systems_without_locks_give_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    lock_run_folder(tmp_path).close()
    assert "without locks (Operation not supported)" in caplog.text
