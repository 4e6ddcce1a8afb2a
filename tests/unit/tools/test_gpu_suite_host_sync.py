"""The GPU suite's detection of host synchronizations in the MoE layer."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.moe import statistics
from tools.bench_moe.shapes import Shape
from tools.gpu_suite import host_sync
from tools.gpu_suite.layer_cases import ROUTING_CASES, SYNC_ONLY_CASES
from tools.gpu_suite.options import Options
from tools.gpu_suite.results import Check, Report

ALL_CASES = [*ROUTING_CASES, *SYNC_ONLY_CASES]


def checks_on(device: str, scratch: Path) -> list[Check]:
    report = Report()
    options = Options(device=torch.device(device), deadline=time.monotonic() + 100, scratch=scratch)
    host_sync.check_host_sync(options, report)
    return report.checks


class FakeCuda:
    """Replaces CUDA's sync debug mode and the layers.

    Layers named in `synchronizing` raise in the mode "error"; those in `failing` always raise.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        synchronizing: tuple[str, ...] = (),
        failing: tuple[str, ...] = (),
    ) -> None:
        self.mode = "default"
        self.checked: list[str] = []
        self.synchronizing, self.failing = synchronizing, failing
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set_mode)
        monkeypatch.setattr(host_sync, "build", self.build)

    def set_mode(self, mode: str) -> None:
        self.mode = mode

    def build(self, name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
        assert device.type == "cuda" and shape.tokens >= 4096

        def run() -> None:
            if name in self.failing:
                raise RuntimeError("no such kernel\nsecond line")
            if self.mode == "error":
                self.checked.append(name)
                if name in self.synchronizing:
                    raise RuntimeError("called a synchronizing CUDA operation\nsecond line")

        experts = SimpleNamespace(backend="auto")
        return SimpleNamespace(layer=SimpleNamespace(experts=experts), run=run)


def test_synchronization_fails_on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sum_by_modality = statistics._sum_by_modality

    def synchronizing(values: torch.Tensor, split: int) -> torch.Tensor:
        return sum_by_modality(values * float(values.sum() > 0), split)

    monkeypatch.setattr(statistics, "_sum_by_modality", synchronizing)
    checks = checks_on("cpu", tmp_path)
    assert not any(check.passed for check in checks)
    assert "_local_scalar_dense" in checks[0].note


def test_synchronization_fails_on_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, synchronizing=("modality pools", "sampled"))
    checks = {check.name.partition(":")[0]: check for check in checks_on("cuda", tmp_path)}
    assert cuda.checked == list(checks) == ALL_CASES and cuda.mode == "default"
    failed = [name for name, check in checks.items() if not check.passed]
    assert failed == ["modality pools", "sampled"]
    assert checks["sampled"].note == "called a synchronizing CUDA operation"


def test_failing_case_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(monkeypatch, failing=("default",))
    first, *others = checks_on("cuda", tmp_path)
    assert (first.name, first.passed, first.note) == ("default: runs", False, "no such kernel")
    assert len(others) == len(ALL_CASES) - 1 and all(check.passed for check in others)
    assert "default" not in cuda.checked


def test_recorded_operations() -> None:
    x = torch.arange(6)
    with host_sync.HostSyncRecorder() as recorder:
        x.cumsum(0), x.argsort(), x[torch.tensor([1, 2])], torch.where(x > 2, x, 0)
    assert recorder.ops == []
    with host_sync.HostSyncRecorder() as recorder:
        x[x > 2], x.nonzero(), x.sum().item()
    assert len(recorder.ops) >= 3
