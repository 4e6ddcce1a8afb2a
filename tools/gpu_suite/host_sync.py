"""Host synchronizations inside an MoE layer; without expert parallelism there must be none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tools.bench_moe.shapes import Shape
from tools.gpu_suite.layer_cases import ROUTING_CASES, SYNC_ONLY_CASES, build
from tools.gpu_suite.options import Options
from tools.gpu_suite.results import Check, Report

SYNCHRONIZING_OPS = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "is_nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "equal",
)
"""Operations whose result, or the size of it, the host must know."""


class HostSyncRecorder(TorchDispatchMode):
    """Records operations that would synchronize the host with a GPU; works on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in SYNCHRONIZING_OPS or (name.startswith("index") and _has_mask(args)):
            self.ops.append(name)
        return func(*args, **kwargs or {})


def _has_mask(args: Sequence[Any]) -> bool:
    """Whether an index is a boolean mask: the host must know how many elements are true."""
    for arg in args:
        if not isinstance(arg, (list, tuple)):
            continue
        if any(isinstance(item, torch.Tensor) and item.dtype == torch.bool for item in arg):
            return True
    return False


def check_host_sync(options: Options, report: Report) -> None:
    """Check forward and backward of the layer with grouped matrix products, in every case."""
    sizes = (4096, 512, 256, 16, 3) if options.on_gpu else (128, 32, 16, 8, 2)
    shape = Shape("checked", *sizes)
    check = _check_on_gpu if options.on_gpu else _check_on_cpu
    for name in ROUTING_CASES | SYNC_ONLY_CASES:
        try:
            case = build(name, shape, options.device, torch.bfloat16)
            case.layer.experts.backend = "grouped"
            case.run()  # one-time initialization may synchronize
        except RuntimeError as error:  # fails only this case
            note = str(error).splitlines()[0]
            report.add(Check(name=f"{name}: runs", passed=False, note=note))
            continue
        report.add(check(name, case.run))


def _check_on_gpu(name: str, run: Callable[[], object]) -> Check:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    problem = ""
    try:
        run()
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Check(
        name=f"{name}: no host synchronization",
        passed=not problem,
        measured="synchronizes" if problem else "none",
        expected="none",
        note=problem,
    )


def _check_on_cpu(name: str, run: Callable[[], object]) -> Check:
    with HostSyncRecorder() as recorder:
        run()
    return Check(
        name=f"{name}: no synchronizing operations",
        passed=not recorder.ops,
        measured=f"{len(recorder.ops)} operations",
        expected="0 operations",
        note=", ".join(sorted(set(recorder.ops))),
    )
