"""Traces (recorded values of training steps) and results for tests of `pretrain.parity`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.parity.cases import Case
from pretrain.parity.compare import compare_traces, num_assignments
from pretrain.parity.job import Result
from pretrain.parity.tolerances import find_mismatches

Change = Callable[[Tensor], Tensor]


def make_trace() -> dict[str, Tensor]:
    """A trace: values recorded in three steps of a model with four experts in one process."""
    generator = torch.Generator().manual_seed(0)
    loads = torch.tensor([[[10.0, 20.0, 30.0, 40.0]]]).expand(1, 2, 4)
    tensors: dict[str, Tensor] = {
        "start/parameters/w": torch.ones(300),
        "0/parameters/w": torch.ones(300) * 2,
    }
    for step in (0, 1, 2):
        tensors |= {
            f"{step}/loss/total": torch.tensor(2.0),
            f"{step}/term/balance": torch.tensor(1.0),
            f"{step}/term/shortfall": torch.tensor(1e-7),
            f"{step}/norm/norm": torch.tensor(3.0),
            f"{step}/counts/pairs": torch.tensor(8.0),
            f"{step}/biases/biases": torch.zeros(1, 2, 4),
            f"{step}/loads/experts": loads.clone(),
            f"{step}/assignments/kept": loads.clone(),
            f"{step}/statistics/z": torch.tensor([1.0, 2.0]),
        }
    tensors["2/parameters/w"] = torch.ones(300) * 3
    tensors["0/gradient/a.experts.w1@0:4"] = torch.randn(4, 3, generator=generator)
    for name in ("gate", "stem", "head"):  # the median ignores one of them
        tensors[f"0/gradient/{name}"] = torch.randn(5, generator=generator)
    return tensors


def changed_trace(name: str, change: Change) -> dict[str, Tensor]:
    """The trace with one tensor changed."""
    tensors = make_trace()
    tensors[name] = change(tensors[name].clone())
    return tensors


def move_assignments(count: int) -> Change:
    """Moves assignments of the first layer from expert 0 to expert 1."""

    def change(loads: Tensor) -> Tensor:
        loads[0, 0, 0] -= count
        loads[0, 0, 1] += count
        return loads

    return change


def mismatches(actual: dict[str, Tensor], precision: str = "fp32") -> dict[str, str]:
    """Name of the largest difference of each mismatching quantity."""
    reference = make_trace()
    differences = compare_traces(actual, reference)
    found = find_mismatches(differences, precision, num_assignments(reference))
    return {mismatch.quantity: mismatch.name for mismatch in found}


def make_result(
    status: str = "ok", actual: dict[str, Tensor] | None = None, **fields: Any
) -> Result:
    """A result with this status, or that of comparing `actual` with `make_trace()`."""
    if status not in ("ok", "mismatch"):
        return Result(case=Case(), world_size=2, status=status, **fields)
    reference = make_trace()
    differences = compare_traces(actual or make_trace(), reference)
    found = find_mismatches(differences, "fp32", num_assignments(reference))
    return Result(
        case=Case(),
        world_size=2,
        status="mismatch" if found else "ok",
        differences=differences,
        mismatches=found,
        **fields,
    )
