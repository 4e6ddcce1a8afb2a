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
    "zero_stage": 1,
    "expert_parallel_size": 1,
    "precision": "fp32",
    "micro_batch_size": 8,
    "recompute": False,
    "top_k": 2,
    "shared_experts": 1,
    "missing_rows": [],
}
CASES = {
    1: [
        {"zero_stage": 0, "top_k": 1, "shared_experts": 0},
        {"micro_batch_size": 2, "recompute": True},
        {"zero_stage": 2, "top_k": 3},
        {"precision": "bf16"},
    ],
    2: [
        {"zero_stage": 0, "expert_parallel_size": 2, "micro_batch_size": 4, "missing_rows": [1]},
        {"expert_parallel_size": 2, "micro_batch_size": 2, "recompute": True, "top_k": 3},
        # One rank has no pairs.
        {"zero_stage": 2, "micro_batch_size": 4, "missing_rows": [4, 5, 6, 7]},
        {"expert_parallel_size": 2, "micro_batch_size": 4, "missing_rows": [0, 1, 2, 3]},
        {"zero_stage": 2, "expert_parallel_size": 2, "micro_batch_size": 4, "precision": "bf16"},
    ],
}
"""Changes of `DEFAULTS`, by number of processes."""


@pytest.mark.parametrize("world_size", [1, 2])
def test_parity_with_the_builtin_layer(world_size: int) -> None:
    cases = json.dumps([DEFAULTS | changes for changes in CASES[world_size]])
    launch = run_ranks(
        ["-m", "tests.support.deepspeed_layer_worker", cases],
        processes=world_size,
        timeout_seconds=90,
    ).check()
    results = [
        json.loads(line.removeprefix("RESULT "))
        for line in launch.output.splitlines()
        if line.startswith("RESULT ")
    ]
    assert len(results) == len(CASES[world_size])
    for case in results:
        # In bfloat16 the two layers round in different operations.
        tolerance, step_tolerance = (1e-5, 1e-4) if case["precision"] == "fp32" else (5e-2, 2e-2)
        assert case["gradient"] < tolerance, case
        assert max(case["loss"], case["norm"]) < step_tolerance, case
        assert case["assignments"] == 0, case
        assert not case["missing_gradients"], case
        # Two MoE layers with four experts of three weights.
        assert case["num_expert_parameters"] == 2 * 4 * 3 // case["expert_parallel_size"], case
