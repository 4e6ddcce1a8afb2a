"""Correctness checks of the MoE layer benchmark: implementations against the reference layer."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tools.bench_moe.deepspeed_layers import auto_ep, native
from tools.bench_moe.implementations import (
    Implementation,
    Unavailable,
    Weights,
    ours,
    sample_tokens,
    sample_weights,
)
from tools.bench_moe.limits import Limits
from tools.bench_moe.measure import measure_shape
from tools.bench_moe.reference import reference_layer, relative_error, tensor_errors
from tools.bench_moe.results import DENSE, OURS, measurements
from tools.bench_moe.shapes import CPU_SHAPES, EVEN, QUICK_SHAPES, UNEVEN, Shape
from tools.bench_moe.torchtitan_layer import torchtitan

CPU, SHAPE = torch.device("cpu"), QUICK_SHAPES[1]


@pytest.mark.parametrize("build", [ours, native, auto_ep])
@pytest.mark.parametrize("shape", [QUICK_SHAPES[0], QUICK_SHAPES[1]._replace(load=UNEVEN)])
def test_implementations_agree_with_the_reference(build: Any, shape: Shape) -> None:
    weights = sample_weights(shape, CPU, torch.float32)
    x_TD, grad_TD = sample_tokens(shape, weights)
    reference = reference_layer(x_TD, grad_TD, weights, shape.k)
    errors = tensor_errors(build(shape, weights), x_TD, grad_TD, reference)
    assert len(errors) == 6 and max(errors.values()) < 1e-5


@pytest.mark.parametrize(("load_name", "low", "high"), [(EVEN, 1.0, 1.3), (UNEVEN, 1.6, 2.2)])
def test_assignment_does_not_depend_on_rounding(load_name: str, low: float, high: float) -> None:
    for shape in (CPU_SHAPES[0]._replace(load=load_name), CPU_SHAPES[2]._replace(load=load_name)):
        weights = sample_weights(shape, CPU, torch.float32)
        x_TD, _ = sample_tokens(shape, weights)
        logits_TE = torch.nn.functional.linear(x_TD, weights.router).detach()
        sorted_TE, _ = logits_TE.sort(dim=1, descending=True)
        assert float((sorted_TE[:, shape.k - 1] - sorted_TE[:, shape.k]).min()) > 0.1

        expert_ids = logits_TE.topk(shape.k, dim=1).indices.flatten()
        load_E = torch.bincount(expert_ids, minlength=shape.experts).double()
        assert low < float(load_E.max() / load_E.mean()) < high
        assert (float(load_E[-1] / load_E.mean()) < 0.3) == (load_name == UNEVEN)


@pytest.mark.parametrize("weight", ["w2", "router"])
def test_incorrect_and_failing_implementations_are_not_timed(weight: str) -> None:
    def incorrect(shape: Shape, weights: Weights) -> Implementation:
        return ours(shape, weights._replace(**{weight: getattr(weights, weight) * 1.01}))

    def unavailable(shape: Shape, weights: Weights) -> Implementation:
        raise Unavailable("not installed")

    def failing(shape: Shape, weights: Weights) -> Implementation:
        return ours(shape, weights._replace(w1=weights.w1[:, :2]))

    peers = {"incorrect": incorrect, "unavailable": unavailable, "failing": failing}
    result = measure_shape(SHAPE, CPU, torch.float32, repeats=2, peers=peers)
    assert result.incorrect == ["incorrect"] and set(result.seconds) == {OURS, DENSE}
    assert "relative error" in result.not_measured["incorrect"]
    assert result.not_measured["unavailable"] == "not installed"
    assert result.not_measured["failing"].startswith("RuntimeError: ")

    rows = measurements(result, Limits(1e9, 1e9), torch.float32, on_gpu=False)
    verdicts = {row.name: row.verdict() for row in rows}
    assert verdicts[f"{SHAPE.label}: unavailable"] == "not measured"


def test_relative_error() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected.clone(), expected) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, float("nan")]), expected) == float("inf")
    assert relative_error(torch.tensor([3.0]), expected) == float("inf")


def test_torchtitan_is_unavailable_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match="bfloat16"):
        torchtitan(SHAPE, sample_weights(SHAPE, CPU, torch.float32))
    monkeypatch.setitem(sys.modules, "torchtitan", None)
    with pytest.raises(Unavailable, match="cannot be imported"):
        torchtitan(SHAPE, sample_weights(SHAPE, CPU, torch.bfloat16))
