"""torchrun restarts the ranks after one was killed, at once and as often as needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.launch import torchrun

WORKER = Path(__file__).with_name("restart_worker.py")

pytestmark = [pytest.mark.distributed]


@pytest.mark.parametrize(
    ("ranks", "kills", "seconds"),
    [
        pytest.param(2, 3, 110, marks=pytest.mark.timeout(120)),
        pytest.param(4, 20, 900, marks=[pytest.mark.long, pytest.mark.timeout(1000)]),
    ],
)
def test_killed_ranks_are_started_again(ranks: int, kills: int, seconds: int) -> None:
    arguments = [f"--max-restarts={kills}", str(WORKER), str(kills)]
    launch = torchrun(arguments, processes=ranks, timeout_seconds=seconds).check()
    # Groups without a timeout of their own have that of the run, too.
    assert f"RESULT start {kills} timeout 77" in launch.output
