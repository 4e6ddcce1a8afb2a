"""A step that is skipped changes nothing, on every engine and rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import run_ranks

WORKER = Path(__file__).with_name("skip_worker.py")

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

SOME = ["zero0-ep2-fp32", "zero1-ep1-bf16", "zero2_offload-ep1-fp32", "zero3-ep2-fp32"]
OTHERS = ["zero0-ep1-bf16", "zero1-ep2-fp32", "zero2-ep2-bf16", "zero3-ep1-bf16"]


def rows(output: str, label: str) -> dict[str, dict[str, Any]]:
    lines = [line for line in output.splitlines() if line.startswith(f"{label} ")]
    parsed = [json.loads(line.removeprefix(f"{label} ")) for line in lines]
    return {row["cell"]: row for row in parsed}


@pytest.mark.parametrize(
    ("world_size", "cells"),
    [
        (1, ["plain-ep1-fp32"]),
        (2, SOME),
        pytest.param(2, OTHERS, marks=pytest.mark.long),
    ],
    ids=["plain", "some", "others"],
)
def test_skipped_steps_change_nothing(world_size: int, cells: list[str]) -> None:
    arguments = [str(WORKER), ",".join(cells)]
    launch = run_ranks(arguments, processes=world_size, timeout_seconds=280).check()
    results, expected = rows(launch.output, "RESULT"), rows(launch.output, "EXPECTED")
    assert list(results) == list(expected) == cells
    for cell, result in results.items():
        assert result["problems"] == [[]] * world_size, cell
        assert result["losses"] == expected[cell]["losses"], cell
