"""Training with a run folder that cannot be written, and on a full disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bad_input import Workspace, assert_contains, one_error

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def test_run_folder_is_a_file(workspace: Workspace) -> None:
    workspace.run_dir.write_text("a file")
    assert_contains(
        workspace.train_error(), f"run folder {workspace.run_dir}", "File exists", "another --out"
    )


def test_disk_full_when_saving(workspace: Workspace) -> None:
    checkpoints = workspace.run_dir / "checkpoints"
    checkpoints.mkdir(parents=True)
    with small_disk(checkpoints, "1m"):
        workspace.train("schedule.total_steps=2", "schedule.warmup_steps=1").check()
        filler = checkpoints / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))

        assert_contains(
            workspace.train_error(),
            "checkpoint of step 4 was not saved",
            "No space left on device",
            "MiB free",
            "free some",
            f"{checkpoints}/step-00000002 is intact",
        )
        names = sorted(path.name for path in checkpoints.iterdir())
        assert names == ["filler", "latest", "step-00000002"]

        filler.unlink()
        result = workspace.train().check()
        assert_contains(result.output, "resumed from", "step-00000002: step 2,")
        assert (checkpoints / "latest").read_text().strip() == "step-00000004"
    assert workspace.logged_steps() == [1, 2, 3, 4]


def test_disk_full_when_logging(workspace: Workspace) -> None:
    """Training continues without logs; only the final checkpoint fails."""
    workspace.run_dir.mkdir()
    with small_disk(workspace.run_dir, "300k"):
        result = workspace.train("schedule.total_steps=150", "checkpoint.every_steps=0")

    no_space = "No space left on device"
    assert_contains(one_error(result), "checkpoint of step 150 was not saved", no_space)
    assert f"cannot write metrics.jsonl ({no_space})" in result.output
    # One warning for metrics.jsonl, and one for the TensorBoard files.
    assert result.output.count("training continues without it") == 2


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a file system of this size at `folder`; skip the test where that is impossible."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
