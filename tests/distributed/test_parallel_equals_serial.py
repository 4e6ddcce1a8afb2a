"""DeepSpeed on one and two processes against plain torch in one process: losses, norm and every gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("parity_worker.py")
ROOT = WORKER.parents[2]
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def cells(world: int) -> list[list[Any]]:
    """[stage, expert parallel, precision, pairs per forward, recompute, bad rows] of every cell."""
    whole = 8 // world
    found: list[list[Any]] = [
        [stage, ep, precision, whole, False, []]
        for stage in (0, 1, 2, 3)
        for ep in (1, 2)
        for precision in ("fp32", "bf16")
        if ep <= world
    ]
    if world == 1:
        return [*found, [1, 1, "fp32", 2, True, []]]
    return [
        *found,
        [0, 2, "fp32", 2, False, []], [1, 2, "fp32", 2, True, []], [2, 1, "fp32", 2, False, []],
        [3, 2, "fp32", 2, False, []],
        [1, 2, "fp32", 4, False, [1, 6]], [2, 2, "fp32", 2, False, [0, 5]],
        # One rank has no pair at all and must still enter every exchange.
        [1, 2, "fp32", 4, False, [0, 1, 2, 3]], [3, 2, "fp32", 4, False, [4, 5, 6, 7]],
    ]


@pytest.fixture(scope="module", params=[1, 2], ids=["one-process", "two-processes"])
def measured(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Differences of all cells of a world; one launch, since starting ranks costs more than training them."""
    world: int = request.param
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", "--master-addr=127.0.0.1",
               "--master-port=0", str(WORKER), "--cells", json.dumps(cells(world))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    rows = [json.loads(line.removeprefix("CELL ")) for line in done.stdout.splitlines() if line.startswith("CELL ")]
    assert len(rows) == len(cells(world))
    return rows


def test_every_cell_equals_one_process(measured: list[dict[str, Any]]) -> None:
    misses = []
    for row in measured:
        limit = TOLERANCE[row["precision"]]
        if max(row["loss"], row["grad_norm"], row["gradient"]) > limit or row["missing"]:
            misses.append(row)
        if row["precision"] == "fp32" and row["choices"]:
            misses.append(row)
    assert not misses, "\n".join(map(json.dumps, misses))
