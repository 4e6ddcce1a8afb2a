"""A checkpoint of any layout is loaded in any other: equal state, equal loss of the next step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import run_ranks

WORKER = Path(__file__).with_name("layout_worker.py")
MAX_LOSS_DIFFERENCE = 1e-6

pytestmark = [pytest.mark.distributed]

# Layouts by world size. Every stage, expert parallelism, precision and engine occurs.
SOME: dict[int, list[str]] = {
    1: ["plain-ep1-fp32"],
    2: ["zero0-ep2-fp32", "zero2-ep1-bf16", "zero3-ep2-fp32"],
    4: ["zero1-ep2-fp32"],
}
ALL: dict[int, list[str]] = {
    world_size: ["plain-ep1-fp32"] * (world_size == 1)
    + [
        f"zero{stage}-ep{size}-fp32"
        for stage in range(4)
        for size in (1, 2, 4)
        if size <= world_size
    ]
    for world_size in (1, 2, 4)
}


def launch(mode: str, world_size: int, cells: list[str], folder: Path) -> str:
    arguments = [str(WORKER), mode, "--cells", ",".join(cells)]
    arguments += ["--folder", str(folder / "written"), "--out", str(folder / f"read{world_size}")]
    return run_ranks(arguments, processes=world_size, timeout_seconds=1500).check().output


def matrix(layouts: dict[int, list[str]], folder: Path) -> list[dict[str, Any]]:
    """Write a checkpoint of every layout, and load it in all; one result for each pair."""
    for world_size, cells in layouts.items():
        launch("write", world_size, cells, folder)
    results = []
    for world_size, cells in layouts.items():
        for line in launch("read", world_size, cells, folder).splitlines():
            if line.startswith("RESULT "):
                results.append(json.loads(line.removeprefix("RESULT ")))
    return results


@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param(SOME, marks=pytest.mark.timeout(600), id="some"),
        pytest.param(ALL, marks=[pytest.mark.long, pytest.mark.timeout(7200)], id="all"),
    ],
)
def test_any_layout_loads_any_checkpoint(layouts: dict[int, list[str]], tmp_path: Path) -> None:
    results = matrix(layouts, tmp_path)
    num_layouts = sum(map(len, layouts.values()))
    assert len(results) == num_layouts**2
    assert [row for row in results if row["different"]] == []
    same_precision = [row for row in results if row["read"][-4:] == row["written"][-4:]]
    worst = max(same_precision, key=lambda row: row["loss"])
    assert worst["loss"] <= MAX_LOSS_DIFFERENCE, worst
    assert all(row["loss"] < 0.01 for row in results)
