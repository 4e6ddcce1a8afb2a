"""DeepSpeed's own MoE layer on one and two processes against ours in one process: losses, norm,
every gradient."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.launch import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

USUAL: dict[str, Any] = {
    "stage": 1,
    "ep": 1,
    "precision": "fp32",
    "per_forward": 8,
    "recompute": False,
    "k": 2,
    "shared": 1,
    "missing": [],
}
CELLS = {
    1: [
        {"stage": 0, "k": 1, "shared": 0},
        {"per_forward": 2, "recompute": True},
        {"stage": 2, "k": 3},
        {"precision": "bf16"},
    ],
    2: [
        {"stage": 0, "ep": 2, "per_forward": 4, "missing": [1]},
        {"ep": 2, "per_forward": 2, "recompute": True, "k": 3},
        # One rank has no pair at all.
        {"stage": 2, "per_forward": 4, "missing": [4, 5, 6, 7]},
        {"ep": 2, "per_forward": 4, "missing": [0, 1, 2, 3]},
        {"stage": 2, "ep": 2, "per_forward": 4, "precision": "bf16"},
    ],
}
"""Changes of `USUAL` by number of processes."""


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_computes_what_ours_does(world_size: int) -> None:
    cells = json.dumps([USUAL | changes for changes in CELLS[world_size]])
    done = run_ranks(
        ["-m", "tests.support.native_layer_worker", cells], processes=world_size, timeout_seconds=90
    ).check()
    rows = [
        json.loads(line.removeprefix("CELL "))
        for line in done.output.splitlines()
        if line.startswith("CELL ")
    ]
    assert len(rows) == len(CELLS[world_size])
    for row in rows:
        # Two layers in bfloat16 round at different places.
        limit, step_limit = (1e-5, 1e-4) if row["precision"] == "fp32" else (5e-2, 2e-2)
        assert row["gradient"] < limit, row
        assert max(row["loss"], row["norm"]) < step_limit, row
        assert row["choices"] == 0, row
        assert not row["unseen"], row
        assert row["native"] == 2 * 3 * 4 // row["ep"], row  # two layers, three weights an expert
