"""Runs that receive a signal: SIGINT and SIGTERM save a checkpoint, a killed rank ends the run."""

from __future__ import annotations

import signal

import pytest

from tests.support.bad_input import (
    ENDLESS,
    ONE_PROCESS,
    SMALL_MODEL,
    Workspace,
    launch_and_signal,
    split_launcher_output,
)
from tests.support.launch import run_ranks, torchrun

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stop_signal_saves_a_checkpoint(
    workspace: Workspace, signal_number: signal.Signals
) -> None:
    # Background processes of a shell ignore SIGINT, and their children inherit that.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = ["-m", "pretrain", *workspace.train_arguments(*ONE_PROCESS, *ENDLESS)]
    try:
        result, _ = launch_and_signal(
            lambda env: run_ranks(arguments, processes=1, timeout_seconds=60, env=env),
            workspace.run_dir,
            rank=0,
            signal_number=signal_number,
        )
    finally:
        signal.signal(signal.SIGINT, handler)

    result.check()
    assert "Traceback" not in result.output and "saved step" in result.output
    latest = (workspace.run_dir / "checkpoints" / "latest").read_text().strip()
    assert int(latest.removeprefix("step-")) == workspace.logged_steps()[-1] > 0


def test_killed_rank_ends_the_run(workspace: Workspace) -> None:
    settings = [*SMALL_MODEL, *ENDLESS, "parallel.expert_parallel_size=2"]
    arguments = ["-m", "pretrain", *workspace.train_arguments(*settings)]
    result, seconds = launch_and_signal(
        lambda env: torchrun(arguments, processes=2, timeout_seconds=60, env=env),
        workspace.run_dir,
        rank=1,
        signal_number=signal.SIGKILL,
    )
    assert not result.timed_out and seconds < 10
    output, launcher_output = split_launcher_output(result.output)
    assert "Traceback" not in output and "exitcode  : -9" in launcher_output
