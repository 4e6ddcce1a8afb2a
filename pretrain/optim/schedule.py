"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from pretrain.config.schema import ScheduleConfig


def learning_rate(step: int, schedule: ScheduleConfig, peak: float) -> float:
    """Learning rate of optimizer step `step` (0-based).

    Linear warm-up reaches the peak at step `num_warmup_steps`. After it, `cosine` decays towards
    `min_lr_ratio` x peak at `total_steps`, and `constant` stays at the peak. `wsd`
    (warm-up-stable-decay) stays at the peak and decays linearly over the last `decay_ratio` of the
    run.

    Source of `wsd`: Hu et al. 2024 (MiniCPM), arXiv:2404.06395.
    """
    warmup_steps = schedule.num_warmup_steps
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule.kind == "constant":
        return peak

    if schedule.kind == "wsd":
        decay_steps = max(schedule.decay_ratio * schedule.total_steps, 1e-12)
        factor = min(1.0, max(0.0, (schedule.total_steps - step) / decay_steps))
    else:
        steps_after_warmup = max(1, schedule.total_steps - warmup_steps)
        progress = min(1.0, (step - warmup_steps) / steps_after_warmup)
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * factor)
