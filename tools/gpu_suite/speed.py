"""Speed of the MoE layer compared with other implementations, measured by `tools.bench_moe`."""

from __future__ import annotations

import time

import torch

from tools.bench_moe.limits import measure_limits
from tools.bench_moe.measure import measure
from tools.bench_moe.reference import TOLERANCES
from tools.bench_moe.results import OURS, ShapeResult, measurements
from tools.bench_moe.shapes import GPU_SHAPES, LOADS, QUICK_SHAPES
from tools.gpu_suite.options import Options
from tools.gpu_suite.results import Check, Report
from tools.measurements import not_measured
from tools.timing import MIN_REPEATS


def layer_speed(options: Options, report: Report) -> None:
    """Measure one shape after another; skip those for which too little time is left.

    The time of a shape is predicted from that of the previous one.
    """
    dtype = torch.bfloat16
    limits = measure_limits(options.device, dtype, quick=not options.on_gpu)
    repeats = MIN_REPEATS if options.on_gpu else 2
    shapes = GPU_SHAPES if options.on_gpu else QUICK_SHAPES[:1]
    seconds_per_flop = 0.0
    for shape in [shape._replace(load=load) for load in LOADS for shape in shapes]:
        predicted = shape.flops * seconds_per_flop
        if options.seconds_left() < predicted:
            reason = (
                f"no time left: it takes about {predicted:.0f} s; measure it with "
                f"python -m tools.bench_moe"
            )
            report.add(not_measured(f"{shape.label}: {shape.describe()}", reason))
            continue
        start = time.monotonic()
        for result in measure(shape, options.device, dtype, repeats=repeats):
            if OURS in result.errors:
                report.add(_check_errors(result, TOLERANCES[dtype]))
            report.add(*measurements(result, limits, dtype, on_gpu=options.on_gpu))
        seconds_per_flop = (time.monotonic() - start) / shape.flops


def _check_errors(result: ShapeResult, tolerance: float) -> Check:
    errors = result.errors[OURS]
    worst = max(errors, key=errors.__getitem__)
    return Check(
        name=f"{result.shape.label}: agrees with the reference",
        passed=OURS not in result.incorrect,
        measured=f"{errors[worst]:.1e}",
        expected=f"at most {tolerance:.0e}",
        note=f"largest: {worst}",
    )
