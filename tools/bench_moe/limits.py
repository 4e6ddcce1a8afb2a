"""What the machine could do at best, measured in the same run: one big product, one big copy; and
memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from tools.bench_moe.shapes import Shape
from tools.benchmark import PROCESS, cpu_seconds, gpu_seconds

Stopwatch = Callable[[Callable[[], object]], float]


def stopwatch_of(device: torch.device) -> Stopwatch:
    """CPU seconds of this process, or seconds between two events of the GPU."""
    return gpu_seconds if device.type == "cuda" else lambda work: cpu_seconds(work, PROCESS)


class Limits(NamedTuple):
    """Of one device."""

    flops_per_second: float
    bytes_per_second: float

    def least_seconds(self, shape: Shape, dtype: torch.dtype) -> tuple[float, str]:
        """t* of a forward and backward pass, and which of the two limits it is."""
        compute = shape.flops / self.flops_per_second
        traffic = shape.bytes(dtype.itemsize) / self.bytes_per_second
        return max(compute, traffic), "compute" if compute >= traffic else "memory"


def measure_limits(
    device: torch.device, dtype: torch.dtype, *, quick: bool = False, repeats: int = 7
) -> Limits:
    """Best of several runs: a limit is what is possible, not what is usual.

    A square product of side 8192 (CPU 1536), a copy of 2 GiB (CPU 256 MiB); read and write count.
    """
    on_gpu, stopwatch = device.type == "cuda", stopwatch_of(device)
    side = 64 if quick else 8192 if on_gpu else 1536
    size = 1 << 16 if quick else 1 << (31 if on_gpu else 28)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty(side, side, device=device, dtype=dtype)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))

    def best(work: Callable[[], object]) -> float:
        stopwatch(work)
        return min(stopwatch(work) for _ in range(repeats))

    multiplied, copied = (
        best(lambda: torch.mm(a, b, out=product)),
        best(lambda: target.copy_(source)),
    )
    return Limits(2.0 * side**3 / multiplied, 2.0 * size / copied)


def peak_tensor_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most memory that `work` holds at once in tensors beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiled:
        work()
    inner = profiled.profiler
    assert inner is not None and inner.kineto_results is not None
    events = inner.kineto_results.events()
    live = peak = 0
    for _, size in sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    ):
        live += size
        peak = max(peak, live)
    return peak


def geometric_mean(values: list[float]) -> float:
    """exp of the mean logarithm."""
    return math.exp(sum(map(math.log, values)) / len(values))
