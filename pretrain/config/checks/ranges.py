"""Checks of the ranges of single numbers that no section checks itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pretrain.config.schema import RunConfig


class _Range(NamedTuple):
    """A setting, its value, whether the value is allowed, and the allowed range as text."""

    name: str
    value: Any
    is_allowed: bool
    allowed: str


def range_problems(run: RunConfig) -> Iterator[str]:
    """Numbers that are out of range, an objective without any loss, and a schedule that is too
    short for its warm-up and decay."""
    for entry in _ranges(run):
        if not entry.is_allowed:
            yield f"{entry.name} is {entry.value}, but must be {entry.allowed}"
    yield from _objective_problems(run)
    yield from _schedule_problems(run)


def _ranges(run: RunConfig) -> Iterator[_Range]:
    optim, schedule, data = run.optim, run.schedule, run.data
    yield _positive("optim.lr", optim.lr)
    betas_in_range = all(0 <= beta < 1 for beta in optim.betas)
    yield _Range("optim.betas", list(optim.betas), betas_in_range, "in 0..1, 1 excluded")
    yield _positive("optim.eps", optim.eps)
    yield _at_least("optim.weight_decay", optim.weight_decay, 0)
    yield _at_least("optim.clip_norm", optim.clip_norm, 0, note=" (0 turns it off)")
    yield _fraction("schedule.min_lr_ratio", schedule.min_lr_ratio)
    yield _fraction("schedule.decay_ratio", schedule.decay_ratio)
    yield _fraction("data.max_corrupt_ratio", data.max_corrupt_ratio)
    yield _positive("data.timeout_seconds", data.timeout_seconds)
    yield _at_least("data.prefetch", data.prefetch, 1)
    yield _at_least("checkpoint.every_steps", run.checkpoint.every_steps, 0)
    yield _at_least("checkpoint.keep", run.checkpoint.keep, 1)
    yield _at_least("log.every_steps", run.log.every_steps, 1)
    yield _at_least("log.captions_every_steps", run.log.captions_every_steps, 0)
    yield _at_least("log.routing_every_steps", run.log.routing_every_steps, 0)
    yield _at_least("log.num_captions", run.log.num_captions, 0)
    yield _at_least("eval.batch_size", run.eval.batch_size, 1)
    yield _at_least("eval.caption_samples", run.eval.caption_samples, 0)
    yield _Range(
        "loss.logit_scale_init",
        run.loss.logit_scale_init,
        0 < run.loss.logit_scale_init < run.loss.logit_scale_max,
        f"above 0 and below loss.logit_scale_max ({run.loss.logit_scale_max})",
    )
    yield _at_least("seed", run.seed, 0)


def _positive(name: str, value: float) -> _Range:
    return _Range(name, value, value > 0, "above 0")


def _at_least(name: str, value: float, minimum: int, *, note: str = "") -> _Range:
    return _Range(name, value, value >= minimum, f"at least {minimum}{note}")


def _fraction(name: str, value: float) -> _Range:
    return _Range(name, value, 0 <= value <= 1, "in 0..1")


def _objective_problems(run: RunConfig) -> Iterator[str]:
    loss = run.loss
    for name in ("contrastive_weight", "caption_weight"):
        if getattr(loss, name) < 0:
            yield f"loss.{name} is {getattr(loss, name)}, but must be at least 0"
    if loss.contrastive_weight == 0 and loss.caption_weight == 0:
        yield (
            "loss.contrastive_weight and loss.caption_weight are both 0, so there is no training "
            "objective"
        )


def _schedule_problems(run: RunConfig) -> Iterator[str]:
    schedule = run.schedule
    decay_steps = round(schedule.decay_ratio * schedule.total_steps)
    if schedule.kind == "wsd" and schedule.warmup_steps + decay_steps > schedule.total_steps:
        yield (
            f"schedule.warmup_steps ({schedule.warmup_steps}) plus decay (schedule.decay_ratio x "
            f"total_steps = {decay_steps}) exceed schedule.total_steps ({schedule.total_steps})"
        )
