"""The MoE layer benchmark with layers that run out of memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pretrain.moe.layer import MoELayer
from tools.bench_moe.implementations import Implementation, Weights, ours
from tools.bench_moe.limits import Limits
from tools.bench_moe.measure import measure
from tools.bench_moe.results import AUTO_EP, DEEPSPEED, DENSE, OURS, ShapeResult, measurements
from tools.bench_moe.shapes import QUICK_SHAPES, Bounds, Shape

CPU = torch.device("cpu")
LARGE = Shape("large", 8192, 16, 8, 4, 2, Bounds(1.2, 1.4), Bounds(1.3, 1.1))


class OutOfMemoryLayer:
    """This project's layer, which runs out of memory with more than `max_tokens` tokens.

    It fails in run number `fails_at`, counted from 1, or already when it is built (0).
    """

    def __init__(self, max_tokens: int, fails_at: int) -> None:
        self.max_tokens, self.fails_at = max_tokens, fails_at
        self.token_counts: list[int] = []
        self.tensors: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, shape: Shape, weights: Weights) -> Implementation:
        self.token_counts.append(shape.tokens)
        layer = ours(shape, weights)
        if shape.tokens <= self.max_tokens:
            return layer
        self.tensors += [weakref.ref(parameter) for parameter in layer.module.parameters()]
        runs = 0

        def forward(x_TD: torch.Tensor) -> torch.Tensor:
            nonlocal runs
            runs += 1
            masks = x_TD * 2
            self.tensors.append(weakref.ref(masks))
            cycle: list[Any] = [masks]
            cycle.append(cycle)
            if runs == self.fails_at:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 90.00 GiB.\nSecond line."
                )
            return layer.forward(x_TD)

        if not self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return Implementation(layer.module, forward, layer.gradients)


def measure_with(layer: OutOfMemoryLayer, monkeypatch: pytest.MonkeyPatch) -> list[ShapeResult]:
    """Measure beside a peer that fits; check that failed layers leave no tensors behind."""
    live_tensors: list[int] = []

    def count_live_tensors() -> None:
        live_tensors.append(sum(ref() is not None for ref in layer.tensors))

    monkeypatch.setattr(torch.cuda, "empty_cache", count_live_tensors)
    gc.collect()
    gc.disable()  # the benchmark must collect garbage itself
    try:
        peers: dict[str, Callable[[Shape, Weights], Implementation]] = {
            DEEPSPEED: layer,
            AUTO_EP: ours,
        }
        results = measure(LARGE, CPU, torch.float32, repeats=2, peers=peers)
    finally:
        gc.enable()
    failures = sum(tokens > layer.max_tokens for tokens in layer.token_counts)
    assert live_tensors == [0] * failures
    return results


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_failed_layer_is_measured_with_fewer_tokens(
    fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = OutOfMemoryLayer(3000, fails_at)
    full, reduced = measure_with(layer, monkeypatch)
    assert layer.token_counts == [8192, 4096, 2048]
    assert set(full.seconds) == {OURS, AUTO_EP, DENSE}
    assert set(reduced.seconds) == {OURS, DEEPSPEED, DENSE}
    assert full.not_measured == {DEEPSPEED: "out of memory; with 2,048 tokens: measured"}
    assert (full.shape, reduced.shape.tokens, reduced.not_measured) == (LARGE, 2048, {})


def test_rows_of_a_reduced_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {}
    for result in measure_with(OutOfMemoryLayer(3000, 1), monkeypatch):
        for row in measurements(result, Limits(1e9, 1e9), torch.float32, on_gpu=False):
            rows[row.name] = row
    speed = rows[f"large, even, 2,048 tokens: speed against {DEEPSPEED}"]
    time = rows[f"large, even, 2,048 tokens: time against {DENSE}"]
    assert (speed.floor, speed.goal, time.floor, time.goal) == (1.2, 1.4, 1.3, 1.1)
    assert speed.note == time.note and "8,192" in speed.note and "out of memory" in speed.note
    assert f"large, even: speed against {DEEPSPEED}" not in rows
    assert rows[f"large, even: {OURS}"].value is not None
    assert rows[f"large, even: {DEEPSPEED}"].verdict() == "not measured"


def test_layer_that_never_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = OutOfMemoryLayer(0, 1)
    (full,) = measure_with(layer, monkeypatch)
    assert layer.token_counts == [8192, 4096, 2048]
    assert full.not_measured == {DEEPSPEED: "out of memory; with 2,048 tokens: out of memory"}
    # Reduced shapes without a peer have nothing to compare.
    assert capsys.readouterr().err.count("tokens: not measured") == 2
    assert set(full.seconds) == {OURS, AUTO_EP, DENSE}


def test_this_projects_layer_must_not_run_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(MoELayer, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        measure(QUICK_SHAPES[1], CPU, torch.float32, repeats=2, peers={})
