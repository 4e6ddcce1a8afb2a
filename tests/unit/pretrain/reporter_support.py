"""A small run, and readers of its TensorBoard events."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.config.experts import MoEConfig
from pretrain.config.schema import ModelConfig, RunConfig, ScheduleConfig

RUN = RunConfig(
    model=ModelConfig(num_layers=4),
    moe=MoEConfig(num_experts=4, start=1, every=2),
    schedule=ScheduleConfig(total_steps=100, warmup_steps=10),
)
MOE_BLOCKS = (1, 3)


def events(run_dir: Path) -> EventAccumulator:
    """All TensorBoard events of a run folder."""
    accumulator = EventAccumulator(
        str(run_dir / "tensorboard"),
        size_guidance={"scalars": 0, "histograms": 0, "images": 0, "tensors": 0},
    )
    return accumulator.Reload()


def scalars(run_dir: Path, name: str) -> dict[int, float]:
    """A scalar by step; no step may occur twice."""
    scalar_events = events(run_dir).Scalars(name)
    steps = [event.step for event in scalar_events]
    assert len(set(steps)) == len(steps), f"duplicate steps: {steps}"
    return {event.step: event.value for event in scalar_events}
