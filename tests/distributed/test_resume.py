"""A run that is interrupted at any step and resumed equals an uninterrupted run bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import run_ranks
from tests.support.shape_dataset import ShapeDataset

WORKER = Path(__file__).with_name("resume_worker.py")

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


# A case: DeepSpeed settings, precision, expert-parallel size, steps after which the run is stopped.
@pytest.mark.parametrize(
    ("processes", "cases"),
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
def test_resumed_run_equals_uninterrupted_run(
    processes: int, cases: list[Any], shapes: ShapeDataset, tmp_path: Path
) -> None:
    dataset = {
        "folder": str(shapes.folder),
        "tokenizer": str(shapes.tokenizer),
        "vocab_size": shapes.vocab_size,
    }
    launch = run_ranks(
        [
            str(WORKER),
            "--dataset",
            json.dumps(dataset),
            "--out",
            str(tmp_path),
            "--cases",
            json.dumps(cases),
        ],
        processes=processes,
        timeout_seconds=240,
    ).check()
    results = [
        json.loads(line.removeprefix("RESULT "))
        for line in launch.output.splitlines()
        if line.startswith("RESULT ")
    ]
    assert len(results) == sum(len(stop_steps) for *_, stop_steps in cases)
    different = [case for case in results if case["different"] != [[]] * processes]
    assert not different
