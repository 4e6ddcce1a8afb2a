"""Roofline of the machine (peak FLOP/s and memory bandwidth), and peak memory of a function.

The roofline time of a layer is the larger of its FLOPs / peak and its memory traffic / bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from tools.bench_moe.shapes import Shape
from tools.timing import PROCESS_CLOCK, Stopwatch, cpu_seconds, gpu_seconds


def stopwatch_of(device: torch.device) -> Stopwatch:
    """Seconds between two GPU events, or CPU seconds of this process."""
    if device.type == "cuda":
        return gpu_seconds
    return lambda work: cpu_seconds(work, PROCESS_CLOCK)


class Limits(NamedTuple):
    """Peak rates of one device."""

    flops_per_second: float
    bytes_per_second: float

    def min_seconds(self, shape: Shape, dtype: torch.dtype) -> tuple[float, str]:
        """Roofline time of a forward and backward pass, and which limit applies."""
        compute = shape.flops / self.flops_per_second
        memory = shape.bytes(dtype.itemsize) / self.bytes_per_second
        return max(compute, memory), "compute" if compute >= memory else "memory"


def measure_limits(
    device: torch.device, dtype: torch.dtype, *, quick: bool = False, repeats: int = 7
) -> Limits:
    """Measure peak rates; the best of several runs counts.

    Uses a square matrix product of size 8192 (CPU: 1536) and a copy of 2 GiB (CPU: 256 MiB), whose
    reads and writes both count.
    """
    on_gpu, stopwatch = device.type == "cuda", stopwatch_of(device)
    if quick:
        side, size = 64, 1 << 16
    elif on_gpu:
        side, size = 8192, 1 << 31
    else:
        side, size = 1536, 1 << 28
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty(side, side, device=device, dtype=dtype)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))

    def min_seconds(work: Callable[[], object]) -> float:
        stopwatch(work)
        return min(stopwatch(work) for _ in range(repeats))

    product_seconds = min_seconds(lambda: torch.mm(a, b, out=product))
    copy_seconds = min_seconds(lambda: target.copy_(source))
    return Limits(2.0 * side**3 / product_seconds, 2.0 * size / copy_seconds)


def peak_tensor_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Peak memory of tensors that `work` allocates, beyond what was allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    profiler = profile.profiler
    assert profiler is not None and profiler.kineto_results is not None
    events = profiler.kineto_results.events()
    allocations = [
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    ]
    live = peak = 0
    for _, size in sorted(allocations):
        live += size
        peak = max(peak, live)
    return peak


def geometric_mean(values: list[float]) -> float:
    """exp of the mean logarithm."""
    return math.exp(sum(map(math.log, values)) / len(values))
