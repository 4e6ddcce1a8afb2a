"""The layer's speed against its peers, as `tools.bench_moe` measures it."""

from __future__ import annotations

import time

import torch

from tools.bench_moe.limits import measure_limits
from tools.bench_moe.measure import OURS, figures, measure
from tools.bench_moe.shapes import GPU_SHAPES, LOADS, QUICK_SHAPES
from tools.benchmark import MIN_REPEATS
from tools.figures import skipped
from tools.gpu_suite.options import Options
from tools.gpu_suite.results import Check, Report


def layer_speed(options: Options, report: Report) -> None:
    """Shape by shape, while there is time for one more; the last one tells how long a FLOP
    takes."""
    dtype = torch.bfloat16
    limits = measure_limits(options.device, dtype, quick=not options.on_gpu)
    seconds_per_flop = 0.0
    shapes = GPU_SHAPES if options.on_gpu else QUICK_SHAPES[:1]
    for shape in [shape._replace(load=load) for load in LOADS for shape in shapes]:
        needed = shape.flops * seconds_per_flop
        if options.left() < needed:
            why = (
                f"no time left for its {needed:.0f} s or so; python -m tools.bench_moe measures it"
            )
            report.add(skipped(f"{shape.label}: {shape.words()}", why))
            continue
        began = time.monotonic()
        for found in measure(
            shape, options.device, dtype, repeats=MIN_REPEATS if options.on_gpu else 2
        ):
            if OURS in found.off:
                off = found.off[OURS]
                worst = max(off, key=off.__getitem__)
                report.add(
                    Check(
                        name=f"{found.shape.label}: right answers",
                        passed=OURS not in found.wrong,
                        measured=f"{off[worst]:.1e}",
                        asked="at most 2e-02",
                        note=f"most: {worst}",
                    )
                )
            report.add(*figures(found, limits, dtype, on_gpu=options.on_gpu))
        seconds_per_flop = (time.monotonic() - began) / shape.flops
