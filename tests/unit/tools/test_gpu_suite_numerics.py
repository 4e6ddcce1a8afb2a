"""Numerical checks of the GPU suite: correct layers pass, wrong gradients and metrics fail."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.moe import dispatch
from tools.gpu_suite import layer_cases, numerics
from tools.gpu_suite.layer_cases import ROUTING_CASES, SYNC_ONLY_CASES
from tools.gpu_suite.numerics import StepMetrics
from tools.gpu_suite.options import Options
from tools.gpu_suite.results import Report

CPU = torch.device("cpu")


def cpu_options(scratch: Path) -> Options:
    return Options(device=CPU, deadline=time.monotonic() + 100, scratch=scratch)


@pytest.mark.parametrize("case", ROUTING_CASES)
def test_rounding_stays_within_the_tolerance_at_gpu_size(case: str) -> None:
    shape = numerics.GPU_SHAPE
    reference = layer_cases.build(case, shape, CPU, torch.float32).run()
    check = numerics.compare_case(case, case, shape, CPU, torch.bfloat16, reference=reference)
    assert check.passed, check


def test_wrong_gradient_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    correct_backward = dispatch._WeightedSum.backward

    def wrong_backward(ctx: Any, grad_TD: torch.Tensor) -> Any:
        rows, weights, nothing = correct_backward(ctx, grad_TD)
        return rows * (1.1 if grad_TD.dtype == torch.bfloat16 else 1.0), weights, nothing

    report = Report()
    monkeypatch.setattr(dispatch._WeightedSum, "backward", staticmethod(wrong_backward))
    numerics.check_layer(cpu_options(tmp_path), report)
    assert report.checks and not any(check.passed for check in report.checks)


def test_tolerances_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed_checks(loss: float, grad_norm: float, update_norm: float) -> list[str]:
        """Names of failed checks if bfloat16 differs by these factors."""
        metrics = {
            "fp32": StepMetrics({"caption": 2.0}, 3.0, 4.0),
            "bf16": StepMetrics({"caption": 2 * loss}, 3 * grad_norm, 4 * update_norm),
        }
        monkeypatch.setattr(numerics, "run_step", lambda device, precision: metrics[precision])
        report = Report()
        numerics.check_step(cpu_options(tmp_path), report)
        return [check.name.rpartition(": ")[2] for check in report.checks if not check.passed]

    assert failed_checks(1.01, 1.04, 0.96) == []
    assert failed_checks(1.03, 1.06, 0.94) == ["loss caption", "gradient norm", "update norm"]


def test_cases_use_the_settings_that_they_are_named_after() -> None:
    shape = numerics.SMALL_SHAPE
    cases = {name: layer_cases.build(name, shape, CPU, torch.float32) for name in SYNC_ONLY_CASES}
    l1 = cases["L1 losses"]
    l1.run()
    with_losses = {name: value.clone() for name, value in l1.run().items()}
    l1.layer.balance = layer_cases.BalanceConfig()
    without = l1.run()
    changed = {name for name in without if not torch.equal(with_losses[name], without[name])}
    assert changed == {"gate.weight", "experts.w1", "experts.w2", "experts.w3"}

    expert_choice = cases["expert choice"]
    _, _, routing = expert_choice.layer.route(expert_choice.x_TD, expert_choice.tokens)
    assert routing.token_N is not None
    assert cases["sampled"].layer.config.routing == "sampled"
    assert cases["capacity, score order"].layer.config.capacity_priority == "batch"
