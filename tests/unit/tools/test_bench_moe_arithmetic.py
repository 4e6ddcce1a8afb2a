"""Arithmetic of the MoE layer benchmark: FLOPs, roofline, ratios, peak memory."""

from __future__ import annotations

import pytest
import torch

from tools.bench_moe import limits
from tools.bench_moe.implementations import dense
from tools.bench_moe.limits import Limits, geometric_mean, peak_tensor_bytes
from tools.bench_moe.results import (
    DEEPSPEED,
    DENSE,
    OURS,
    ShapeResult,
    mean_measurements,
    measurements,
)
from tools.bench_moe.shapes import CPU_SHAPES, GPU_SHAPES, Bounds, Shape

CPU = torch.device("cpu")


def test_flops_and_bytes_of_a_layer() -> None:
    shape = Shape("counted", 10, 4, 6, 5, 2)
    assert shape.flops == 3 * (2 * 10 * (2 * 3 * 4 * 6 + 4 * 5))
    assert shape.bytes(4) == 4 * (3 * (5 * 3 * 4 * 6 + 5 * 4) + 5 * 10 * 4)
    # The dense network has as many weights as k experts.
    parameters = dense(shape, CPU, torch.float32).module.parameters()
    assert sum(parameter.numel() for parameter in parameters) == 2 * 3 * 4 * 6


def test_roofline_time_is_that_of_the_tighter_limit() -> None:
    shape = Shape("counted", 10, 4, 6, 5, 2)
    memory_bound = Limits(shape.flops, shape.bytes(4) / 2)
    assert memory_bound.min_seconds(shape, torch.float32) == (2.0, "memory")
    compute_bound = Limits(shape.flops / 3, 1e30)
    assert compute_bound.min_seconds(shape, torch.float32) == (3.0, "compute")


def test_measured_limits_count_flops_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "stopwatch_of", lambda device: lambda work: (work(), 0.5)[1])
    measured = limits.measure_limits(CPU, torch.float32, quick=True, repeats=2)
    assert measured == (2 * 64**3 / 0.5, 2 * 65536 / 0.5)


def test_direction_of_ratios() -> None:
    shape = Shape("one", 1, 1, 1, 1, 1, Bounds(1.2, 1.5), Bounds(1.3, 1.1))
    seconds = {OURS: [1.0, 2.0], DEEPSPEED: [1.4, 2.8], DENSE: [0.8, 1.6]}
    result = ShapeResult(shape, seconds=seconds, peak_bytes=dict.fromkeys(seconds, 1 << 20))
    all_rows = measurements(result, Limits(12.0, 1e9), torch.float32, on_gpu=False)
    rows = {row.name: row for row in all_rows}

    speed = rows[f"one, even: speed against {DEEPSPEED}"]
    assert speed.value is not None and speed.value.median == pytest.approx(1.4)
    assert speed.verdict() == "floor"
    overhead = rows[f"one, even: time against {DENSE}"]
    assert overhead.value is not None and overhead.value.median == pytest.approx(1.25)
    assert overhead.verdict() == "floor"
    fraction = rows["one, even: roofline time / time"].value
    assert fraction is not None and fraction.high <= 2.0
    assert fraction.median == pytest.approx(2.0 * (1 + 0.5) / 2)


def test_geometric_mean_over_shapes() -> None:
    shape = Shape("one", 1, 1, 1, 1, 1)
    seconds = {OURS: [1.0, 2.0], DEEPSPEED: [1.4, 2.8], DENSE: [0.8, 1.6]}
    results = [
        ShapeResult(shape, seconds=seconds),
        ShapeResult(shape, seconds=seconds | {DEEPSPEED: [5.6, 11.2]}),
    ]
    speed, *_ = mean_measurements(results, Bounds(1, 2), Bounds())
    assert speed.value is not None and speed.value.median == pytest.approx(2.8)
    assert speed.verdict() == "goal"
    assert geometric_mean([1.4, 5.6]) == pytest.approx(2.8)


def test_peak_memory_counts_live_tensors() -> None:
    def work() -> None:
        first = torch.ones(1000)
        second = first + 1  # the peak: two tensors of 4,000 bytes
        del first
        second.add_(1)
        torch.ones(500)

    assert peak_tensor_bytes(work, CPU) == pytest.approx(8000, abs=200)


def test_gpu_shapes_are_large_and_names_are_distinct() -> None:
    for shape in GPU_SHAPES:
        assert shape.flops > 4e12 and shape.speedup.floor and shape.overhead.goal
    assert len({shape.name for shape in CPU_SHAPES}) == 4
