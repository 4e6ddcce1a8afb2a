"""Problems of the preset tiny with overrides."""

from __future__ import annotations

from pretrain.config.presets import load_unchecked_run
from pretrain.config.validate import problems


def find_problems(overrides: list[str], world_size: int) -> list[str]:
    """Problems of preset tiny with these overrides and a batch that fits `world_size` ranks."""
    batch = {1: ["batch.global_batch_size=64"], 2: []}.get(
        world_size, ["batch={global_batch_size: 480, micro_batch_size: 1}"]
    )
    return problems(load_unchecked_run("tiny", [*batch, *overrides])[0], world_size)


def assert_one_problem(overrides: list[str], world_size: int, parts: list[str]) -> None:
    (problem,) = find_problems(overrides, world_size)
    for part in parts:
        assert part in problem
