"""Does the host ever wait for the GPU inside an MoE layer? Without expert parallelism it must
not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tools.bench_moe.shapes import Shape
from tools.gpu_suite.layers import OTHER_WAYS, WAYS, build
from tools.gpu_suite.options import Options
from tools.gpu_suite.results import Check, Report

READS = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "is_nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "equal",
)
"""Operations whose answer, or its size, the host must know."""


class HostReads(TorchDispatchMode):
    """Counts operations that would make a host wait: what a CPU can tell of it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in READS or (name.startswith("index") and _has_mask(args)):
            self.seen.append(name)
        return func(*args, **kwargs or {})


def _has_mask(args: Sequence[Any]) -> bool:
    """Whether anything is indexed by booleans, of which the host must know how many are true."""
    lists = [arg for arg in args if isinstance(arg, (list, tuple))]
    return any(
        isinstance(each, torch.Tensor) and each.dtype == torch.bool for one in lists for each in one
    )


def synchronizations(options: Options, report: Report) -> None:
    """Forward and backward of the layer with its grouped product, in every way of routing."""
    shape = Shape("checked", *((4096, 512, 256, 16, 3) if options.on_gpu else (128, 32, 16, 8, 2)))
    for way in WAYS | OTHER_WAYS:
        try:
            built = build(way, shape, options.device, torch.bfloat16)
            built.layer.experts.backend = "grouped"
            built.run()  # what is set up once may wait
        except RuntimeError as error:  # what one cannot compute at all does not hide the others
            report.add(Check(name=f"{way}: runs", passed=False, note=str(error).splitlines()[0]))
            continue
        report.add(_on_gpu(way, built.run) if options.on_gpu else _on_cpu(way, built.run))


def _on_gpu(way: str, run: Any) -> Check:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        problem = ""
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Check(
        name=f"{way}: the host never waits",
        passed=not problem,
        measured="a wait" if problem else "no wait",
        asked="no wait",
        note=problem,
    )


def _on_cpu(way: str, run: Any) -> Check:
    with HostReads() as reads:
        run()
    return Check(
        name=f"{way}: nothing is read by the host",
        passed=not reads.seen,
        measured=f"{len(reads.seen)} reads",
        asked="0 reads",
        note=", ".join(sorted(set(reads.seen))),
    )
