"""Results of the MoE layer benchmark, converted to rows of the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from tools.bench_moe.limits import Limits, geometric_mean
from tools.bench_moe.shapes import GROUPED_PEERS, Bounds, Shape
from tools.measurements import Measurement, not_measured
from tools.reporting import format_number
from tools.timing import Quartiles, ratio

OURS, DEEPSPEED, AUTO_EP, TORCHTITAN = (
    "ours",
    "DeepSpeed's layer",
    "AutoEP's layer",
    "torchtitan's layer",
)
DENSE = "dense, equal active FLOPs"


@dataclass
class ShapeResult:
    """Raw results of one shape, by implementation."""

    shape: Shape
    not_measured: dict[str, str] = field(default_factory=dict)
    """Reasons why implementations were not timed."""
    out_of_memory: list[str] = field(default_factory=list)
    """Implementations that ran out of memory; also in `not_measured`."""
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    """Relative error of each tensor."""
    incorrect: list[str] = field(default_factory=list)
    """Implementations with errors above the tolerance; they are not timed."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of each round."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Peak memory of tensors in one run."""


def measurements(
    result: ShapeResult, limits: Limits, dtype: torch.dtype, *, on_gpu: bool
) -> list[Measurement]:
    """All rows of one shape: times, then ratios."""
    shape, seconds = result.shape, result.seconds
    min_seconds, limit = limits.min_seconds(shape, dtype)
    rows = [_time_row(result, name, min_seconds, limit) for name in seconds]
    for name, reason in result.not_measured.items():
        rows.append(not_measured(f"{shape.label}: {name}", reason))
    if OURS not in seconds:
        return rows

    rows += _ratio_rows(result, on_gpu=on_gpu)
    rows.append(
        Measurement(
            name=f"{shape.label}: roofline time / time",
            unit="x",
            note=f"{limit} bound",
            value=Quartiles.of([min_seconds / time for time in seconds[OURS]]),
        )
    )
    return rows


def _time_row(result: ShapeResult, name: str, min_seconds: float, limit: str) -> Measurement:
    times = result.seconds[name]
    note = f"peak memory +{format_number(result.peak_bytes[name] / 2**20)} MiB"
    if name != DENSE:
        fraction = Quartiles.of([min_seconds / time for time in times])
        note += f"; {fraction.median:.0%} of the {limit} limit"
    return Measurement(
        name=f"{result.shape.label}: {name}",
        value=Quartiles.of([1e3 * time for time in times]),
        unit="ms",
        note=note,
    )


def _ratio_rows(result: ShapeResult, *, on_gpu: bool) -> Iterator[Measurement]:
    shape, seconds, note = result.shape, result.seconds, ""
    if shape.full_tokens:
        note = f"not {shape.full_tokens:,} tokens: a layer runs out of memory"
    grouped = GROUPED_PEERS if on_gpu else Bounds()
    for name, bounds in (
        (DEEPSPEED, shape.speedup),
        (AUTO_EP, grouped),
        (TORCHTITAN, grouped),
    ):
        if name in seconds:
            yield Measurement(
                name=f"{shape.label}: speed against {name}",
                value=ratio(seconds[name], seconds[OURS]),
                unit="x",
                floor=bounds.floor,
                goal=bounds.goal,
                note=note,
            )
    yield Measurement(
        name=f"{shape.label}: time against {DENSE}",
        value=ratio(seconds[OURS], seconds[DENSE]),
        unit="x",
        floor=shape.overhead.floor,
        goal=shape.overhead.goal,
        less_is_better=True,
        note=note,
    )


def mean_measurements(
    results: list[ShapeResult], speedup: Bounds, overhead: Bounds
) -> list[Measurement]:
    """Geometric means of the ratios over all shapes, round by round."""
    load = results[0].shape.load
    rows = []
    for name, numerator, denominator, bounds, less_is_better in (
        (f"speed against {DEEPSPEED}", DEEPSPEED, OURS, speedup, False),
        (f"time against {DENSE}", OURS, DENSE, overhead, True),
    ):
        if not all({numerator, denominator} <= result.seconds.keys() for result in results):
            continue
        ratios_by_shape = []
        for result in results:
            pairs = zip(result.seconds[numerator], result.seconds[denominator], strict=True)
            ratios_by_shape.append([a / b for a, b in pairs])
        rounds = [geometric_mean(list(ratios)) for ratios in zip(*ratios_by_shape, strict=True)]
        rows.append(
            Measurement(
                name=f"all shapes, {load}: {name}",
                value=Quartiles.of(rounds),
                unit="x",
                floor=bounds.floor,
                goal=bounds.goal,
                less_is_better=less_is_better,
                note="geometric mean",
            )
        )
    return rows
