"""Fixtures for tests that run `vlmoe` with bad input; see `tests/support/bad_input.py`."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

# As in tests/conftest.py, the fixtures import what they need: torch alone takes seconds.
if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.bad_input import Workspace
    from tests.support.command_server import CommandRunner
    from tests.support.shape_dataset import ShapeDataset


@pytest.fixture(scope="module")
def vlmoe() -> Iterator[CommandRunner]:
    """The `vlmoe` command; its server imports torch, so it is started by the first call."""
    from tests.support.command_server import command_server

    with contextlib.ExitStack() as stack:

        @functools.cache
        def server() -> CommandRunner:
            return stack.enter_context(command_server())

        yield lambda *args, **options: server()(*args, **options)


@pytest.fixture
def workspace(vlmoe: CommandRunner, shapes: ShapeDataset, tmp_path: Path) -> Workspace:
    """A copy of the shards, and a run folder that does not exist yet."""
    from tests.support.bad_input import Workspace

    shutil.copytree(shapes.folder, tmp_path / "shards")
    return Workspace(
        vlmoe=vlmoe,
        shards=tmp_path / "shards",
        run_dir=tmp_path / "run",
        tokenizer=shapes.tokenizer,
    )


@pytest.fixture(scope="module")
def trained_run(
    vlmoe: CommandRunner, shapes: ShapeDataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run of four steps with checkpoints of steps 2 and 4; read-only."""
    from tests.support.bad_input import ONE_PROCESS

    run_dir = tmp_path_factory.mktemp("trained") / "run"
    vlmoe(["train", "tiny", "--out", str(run_dir), *ONE_PROCESS, *shapes.overrides]).check()
    return run_dir


@pytest.fixture
def trained_workspace(trained_run: Path, workspace: Workspace) -> Workspace:
    """A workspace with a copy of a trained run folder."""
    shutil.copytree(trained_run, workspace.run_dir)
    return workspace
