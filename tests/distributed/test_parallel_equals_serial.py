"""DeepSpeed on one, two and four processes against plain torch in one process: losses, norm and every gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import run_ranks

WORKER = Path(__file__).with_name("parity_worker.py")
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
LATER = 1e-4
"""Of the steps after the first: Adam makes steps of full size from gradients that are nothing but rounding."""

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def cells(world: int) -> list[list[Any]]:
    """[stage, expert parallel, precision, pairs per forward, recompute, bad rows, routing] of every cell."""
    return [cell if len(cell) == 7 else [*cell, ""] for cell in _cells(world)]


def _cells(world: int) -> list[list[Any]]:
    """The cells; those with six numbers route as usual."""
    whole = 8 // world
    found: list[list[Any]] = [
        [stage, ep, precision, whole, False, []]
        for stage in (0, 1, 2, 3)
        for ep in (1, 2)
        for precision in ("fp32", "bf16")
        if ep <= world
    ]
    if world == 1:
        return [
            *found, [1, 1, "fp32", 2, True, []], ["2_offload", 1, "fp32", 2, False, []],
            [0, 1, "fp32", 2, True, [], "noisy"], [3, 1, "fp32", 4, False, [], "sampled"],
        ]
    if world == 4:
        # Two copies of the experts: each expert's gradient is summed inside a copy and averaged over the copies.
        return [[0, 2, "fp32", 2, False, []], [1, 2, "fp32", 1, False, []], [3, 2, "fp32", 2, False, []],
                [2, 4, "fp32", 2, False, [0, 1]], [1, 2, "bf16", 2, False, []],
                [1, 2, "fp32", 2, False, [2], "noisy"], [2, 4, "fp32", 2, False, [], "sampled"],
                [0, 1, "fp32", 1, False, [], "pools"]]
    return [
        *found,
        [0, 2, "fp32", 2, False, []], [1, 2, "fp32", 2, True, []], [2, 1, "fp32", 2, False, []],
        [3, 2, "fp32", 2, False, []], [3, 2, "fp32", 2, True, []], ["2_offload", 2, "fp32", 2, False, []],
        [1, 2, "fp32", 4, False, [1, 6]], [2, 2, "fp32", 2, False, [0, 5]],
        # One rank has no pair at all and must still enter every exchange.
        [1, 2, "fp32", 4, False, [0, 1, 2, 3]], [3, 2, "fp32", 4, False, [4, 5, 6, 7]],
        [0, 2, "fp32", 4, False, [], "noisy"], [3, 2, "fp32", 2, True, [0, 5], "noisy"],
        [1, 2, "fp32", 2, False, [4, 5, 6, 7], "sampled"], [2, 1, "fp32", 4, False, [3], "sampled"],
        [1, 2, "fp32", 4, False, [], "experts"], [2, 2, "fp32", 1, True, [], "pools"],
    ]


@pytest.fixture(scope="module", params=[1, 2, 4], ids=["one-process", "two-processes", "four-processes"])
def measured(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Differences of all cells of a world; one launch, since starting ranks costs more than training them."""
    world: int = request.param
    done = run_ranks(
        [str(WORKER), "--cells", json.dumps(cells(world))], processes=world, timeout_seconds=240
    ).check()
    rows = [json.loads(line.removeprefix("CELL ")) for line in done.output.splitlines() if line.startswith("CELL ")]
    assert len(rows) == len(cells(world))
    return rows


def test_every_cell_equals_one_process(measured: list[dict[str, Any]]) -> None:
    misses = []
    for row in measured:
        limit = TOLERANCE[row["precision"]]
        if max(row["loss"], row["grad_norm"], row["gradient"]) > limit or row["missing"] or row["later"] > LATER:
            misses.append(row)
        if row["precision"] == "fp32" and (row["choices"] or row["bias"] > 1e-6):
            misses.append(row)
        if not row["moved"] or (row["routing"] in ("noisy", "sampled", "pools")) != (row["dropped"] > 0):
            misses.append(row)
    assert not misses, "\n".join(map(json.dumps, misses))
