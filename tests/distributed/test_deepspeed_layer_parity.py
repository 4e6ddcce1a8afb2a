"""DeepSpeed's MoE layer on one and two processes, compared with the builtin layer in one process.

Compares losses, gradient norm and every gradient.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.launch import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

DEFAULTS: dict[str, Any] = {
    "stage": 1,
    "ep": 1,
    "precision": "fp32",
    "micro_batch_size": 8,
    "recompute": False,
    "k": 2,
    "shared": 1,
    "missing": [],
}
CELLS = {
    1: [
        {"stage": 0, "k": 1, "shared": 0},
        {"micro_batch_size": 2, "recompute": True},
        {"stage": 2, "k": 3},
        {"precision": "bf16"},
    ],
    2: [
        {"stage": 0, "ep": 2, "micro_batch_size": 4, "missing": [1]},
        {"ep": 2, "micro_batch_size": 2, "recompute": True, "k": 3},
        # One rank has no pairs.
        {"stage": 2, "micro_batch_size": 4, "missing": [4, 5, 6, 7]},
        {"ep": 2, "micro_batch_size": 4, "missing": [0, 1, 2, 3]},
        {"stage": 2, "ep": 2, "micro_batch_size": 4, "precision": "bf16"},
    ],
}
"""Changes of `DEFAULTS`, by number of processes."""


@pytest.mark.parametrize("world_size", [1, 2])
def test_parity_with_the_builtin_layer(world_size: int) -> None:
    cells = json.dumps([DEFAULTS | changes for changes in CELLS[world_size]])
    result = run_ranks(
        ["-m", "tests.support.native_layer_worker", cells], processes=world_size, timeout_seconds=90
    ).check()
    rows = [
        json.loads(line.removeprefix("CELL "))
        for line in result.output.splitlines()
        if line.startswith("CELL ")
    ]
    assert len(rows) == len(CELLS[world_size])
    for row in rows:
        # In bfloat16 the two layers round in different operations.
        tolerance, step_tolerance = (1e-5, 1e-4) if row["precision"] == "fp32" else (5e-2, 2e-2)
        assert row["gradient"] < tolerance, row
        assert max(row["loss"], row["norm"]) < step_tolerance, row
        assert row["assignments"] == 0, row
        assert not row["unseen"], row
        assert row["native"] == 2 * 3 * 4 // row["ep"], row  # two layers, three weights per expert
