"""A run that is cut at any step and resumed gives bitwise the numbers of the unbroken run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import run_ranks
from tests.support.shards import Shapes

WORKER = Path(__file__).with_name("resume_worker.py")

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("processes", "cells"),
    [
        (
            2,
            [
                ["zero1", "fp32", 2, [1, 2, 3, 4]],
                ["zero0", "fp32", 2, [3]],
                ["zero2", "fp32", 1, [2]],
                ["zero3", "fp32", 2, [3]],
                ["zero1", "bf16", 2, [2]],
                ["zero3", "bf16", 1, [2]],
                ["zero0", "bf16", 1, [2]],
            ],
        ),
        (1, [["zero1", "fp32", 1, [3]], ["zero3", "fp32", 1, [1]]]),
    ],
    ids=["two-processes", "one-process"],
)
def test_resumed_equals_unbroken(
    processes: int, cells: list[Any], shapes: Shapes, tmp_path: Path
) -> None:
    described = {
        "folder": str(shapes.folder),
        "tokenizer": str(shapes.tokenizer),
        "vocab_size": shapes.vocab_size,
    }
    done = run_ranks(
        [
            str(WORKER),
            "--shapes",
            json.dumps(described),
            "--out",
            str(tmp_path),
            "--cells",
            json.dumps(cells),
        ],
        processes=processes,
        timeout_seconds=240,
    ).check()
    rows = [
        json.loads(line.removeprefix("CELL "))
        for line in done.output.splitlines()
        if line.startswith("CELL ")
    ]
    assert len(rows) == sum(len(cuts) for *_, cuts in cells)
    assert all(row["different"] == [[]] * processes for row in rows), "\n".join(
        map(json.dumps, rows)
    )
