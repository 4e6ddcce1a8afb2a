"""One shape: arms are built, compared with the plain layer, and then timed in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from tools.bench_moe.agreement import LIMITS, differences, plain_layer
from tools.bench_moe.arms import Arm, Missing, Weights, dense, draw_tokens, draw_weights, ours
from tools.bench_moe.deepspeed_layers import auto_ep, native
from tools.bench_moe.limits import Limits, geometric_mean, peak_tensor_bytes, stopwatch_of
from tools.bench_moe.shapes import GROUPED_PEERS, LEAST_TOKENS, Bounds, Shape
from tools.bench_moe.torchtitan_layer import torchtitan
from tools.benchmark import Quartiles, figure, interleave, note, ratio
from tools.figures import Figure, skipped

OURS, DEEPSPEED, AUTO_EP, TORCHTITAN = (
    "ours",
    "DeepSpeed's layer",
    "AutoEP's layer",
    "torchtitan's layer",
)
DENSE = "dense, equal active FLOPs"
OUT_OF_MEMORY = "out of memory"
Build = Callable[[Shape, Weights], Arm]
PEERS: Mapping[str, Build] = {DEEPSPEED: native, AUTO_EP: auto_ep, TORCHTITAN: torchtitan}


@dataclass
class Measured:
    """What one shape gave."""

    shape: Shape
    missing: dict[str, str] = field(default_factory=dict)
    """Arms that could not be built, or gave something else, and why."""
    too_large: list[str] = field(default_factory=list)
    """Those of them that ran out of memory."""
    off: dict[str, dict[str, float]] = field(default_factory=dict)
    """How far each arm is off, by tensor."""
    wrong: list[str] = field(default_factory=list)
    """Arms that are further off than allowed; they are not timed."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Of each round, by arm."""
    peak_bytes: dict[str, int] = field(default_factory=dict)


def measure(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    repeats: int,
    peers: Mapping[str, Build] = PEERS,
) -> list[Measured]:
    """A shape; and peers that ran out of memory once more, beside ours, with half as many tokens
    until they fit."""
    whole = measure_shape(shape, device, dtype, repeats=repeats, peers=peers)
    found, large, tokens = [whole], whole.too_large, shape.tokens // 2
    while large and tokens >= LEAST_TOKENS:
        theirs = {name: peers[name] for name in large}
        smaller = measure_shape(
            shape.with_fewer(tokens), device, dtype, repeats=repeats, peers=theirs
        )
        for name in large:
            whole.missing[name] = (
                f"{OUT_OF_MEMORY}; with {tokens:,} tokens: {smaller.missing.get(name, 'measured')}"
            )
        if set(large) - set(smaller.too_large):
            found.append(smaller)
        large, tokens = smaller.too_large, tokens // 2
    return found


def measure_shape(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    repeats: int,
    peers: Mapping[str, Build] = PEERS,
) -> Measured:
    """Build, compare, time and weigh every arm; with fewer tokens than the whole shape only if a
    peer fits."""
    found = Measured(shape)
    weights = draw_weights(shape, device, dtype)
    x_TD, grad_TD = draw_tokens(shape, weights)
    arms = _right_arms(found, {OURS: ours, **peers}, weights, x_TD, grad_TD)
    arms[DENSE] = dense(shape, device, dtype)
    _leave_out_who_no_longer_fits(found, arms, x_TD, grad_TD)
    without = "".join(f"; no {name} ({why})" for name, why in found.missing.items())
    if shape.whole_tokens and not arms.keys() & peers.keys():
        note(f"{shape.label}: not measured{without}")
        return found
    note(f"{shape.label}: {', '.join(arms)} in turns{without}")
    work = {name: partial(arm.run, x_TD, grad_TD) for name, arm in arms.items()}
    found.seconds = interleave(work, repeats=repeats, stopwatch=stopwatch_of(device))
    for name, arm in arms.items():
        for other in arms.values():  # what is held before an arm runs is nobody's gradients
            other.module.zero_grad(set_to_none=True)
        x_TD.grad = None
        found.peak_bytes[name] = peak_tensor_bytes(partial(arm.run, x_TD, grad_TD), device)
    del arms, work
    gc.collect()
    return found


def _right_arms(
    found: Measured, builds: Mapping[str, Build], weights: Weights, x_TD: Tensor, grad_TD: Tensor
) -> dict[str, Arm]:
    """Arms that give the plain layer's answers; `found` tells what is wrong with the others."""
    truth, limit = plain_layer(x_TD, grad_TD, weights, found.shape.k), LIMITS[x_TD.dtype]
    arms: dict[str, Arm] = {}

    def compared(build: Build) -> tuple[Arm, dict[str, float]]:
        arm = build(found.shape, weights)
        return arm, differences(arm, x_TD, grad_TD, truth)

    for name, build in builds.items():
        try:
            arms[name], off = compared(build)
        except Missing as reason:
            found.missing[name] = str(reason)
        except Exception as error:  # whatever another's layer runs into here, the rest is measured
            if name == OURS:
                raise
            _leave_out(found, name, error)
        else:
            found.off[name] = off
            worst = max(off, key=off.__getitem__)
            if off[worst] > limit:
                found.wrong.append(name)
                found.missing[name] = (
                    f"another answer: {worst} is off by {off[worst]:.1e}, more than {limit:.0e}"
                )
                del arms[name]
        _free_after(found, name, x_TD)
    return arms


def _leave_out_who_no_longer_fits(
    found: Measured, arms: dict[str, Arm], x_TD: Tensor, grad_TD: Tensor
) -> None:
    """Run every arm while the weights and gradients of all are there, as they are when time is
    taken."""
    for name in reversed(list(arms)):  # the dense network is last, and alone has no gradients yet
        try:
            arms[name].run(x_TD, grad_TD)
        except torch.OutOfMemoryError as error:
            if name in (OURS, DENSE):
                raise
            del arms[name]
            _leave_out(found, name, error)
        _free_after(found, name, x_TD)


def _leave_out(found: Measured, name: str, error: Exception) -> None:
    if isinstance(error, torch.OutOfMemoryError):
        found.too_large.append(name)
        found.missing[name] = OUT_OF_MEMORY
    else:
        found.missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]


def _free_after(found: Measured, name: str, x_TD: Tensor) -> None:
    """Give all memory back after an arm that wanted too much of it.

    Call it when the error is gone, which holds the frames of the arm and their tensors.
    """
    if name in found.too_large:
        x_TD.grad = None
        gc.collect()
        torch.cuda.empty_cache()


def figures(found: Measured, limits: Limits, dtype: torch.dtype, *, on_gpu: bool) -> list[Figure]:
    """The lines of one shape."""
    shape, seconds = found.shape, found.seconds
    least, which = limits.least_seconds(shape, dtype)
    fewer = (
        f"not {shape.whole_tokens:,} tokens: a layer runs out of memory"
        if shape.whole_tokens
        else ""
    )
    lines = []
    for name, times in seconds.items():
        share = Quartiles.of([least / time for time in times])
        text = f"holds {figure(found.peak_bytes[name] / 2**20)} MiB more at most"
        if name != DENSE:
            text += f"; {share.median:.0%} of the {which} limit"
        lines.append(
            Figure(name=f"{shape.label}: {name}", value=_milliseconds(times), unit="ms", note=text)
        )
    lines += [skipped(f"{shape.label}: {name}", why) for name, why in found.missing.items()]
    if OURS not in seconds:
        return lines
    for name, bounds in (
        (DEEPSPEED, shape.faster),
        *((n, GROUPED_PEERS if on_gpu else Bounds()) for n in (AUTO_EP, TORCHTITAN)),
    ):
        if name in seconds:
            lines.append(
                Figure(
                    name=f"{shape.label}: speed against {name}",
                    value=ratio(seconds[name], seconds[OURS]),
                    unit="x",
                    floor=bounds.floor,
                    goal=bounds.goal,
                    note=fewer,
                )
            )
    lines.append(
        Figure(
            name=f"{shape.label}: time against {DENSE}",
            value=ratio(seconds[OURS], seconds[DENSE]),
            unit="x",
            floor=shape.overhead.floor,
            goal=shape.overhead.goal,
            less_is_better=True,
            note=fewer,
        )
    )
    lines.append(
        Figure(
            name=f"{shape.label}: least possible time / time",
            unit="x",
            note=f"{which} bound",
            value=Quartiles.of([least / time for time in seconds[OURS]]),
        )
    )
    return lines


def mean_figures(all_found: list[Measured], faster: Bounds, overhead: Bounds) -> list[Figure]:
    """Geometric means over the shapes, round by round."""
    load = all_found[0].shape.load
    lines = []
    for name, top, bottom, bounds, less in (
        (f"speed against {DEEPSPEED}", DEEPSPEED, OURS, faster, False),
        (f"time against {DENSE}", OURS, DENSE, overhead, True),
    ):
        if not all({top, bottom} <= found.seconds.keys() for found in all_found):
            continue
        pairs = [zip(found.seconds[top], found.seconds[bottom], strict=True) for found in all_found]
        rounds = [geometric_mean([a / b for a, b in both]) for both in zip(*pairs, strict=True)]
        lines.append(
            Figure(
                name=f"all shapes, {load}: {name}",
                value=Quartiles.of(rounds),
                unit="x",
                floor=bounds.floor,
                goal=bounds.goal,
                less_is_better=less,
                note="geometric mean",
            )
        )
    return lines


def _milliseconds(times: list[float]) -> Quartiles:
    return Quartiles.of([1e3 * time for time in times])
