"""The parts of the GPU suite, in the order in which they run."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """One group of checks or benchmarks."""

    description: str
    seconds: float
    """Time budget on a GPU."""
    entry_point: str
    """Module of this package and function, as `module:function`."""
    only_measurements: bool = False
    """Whether the part only measures, so that running out of time is not a failure."""


PARTS = {
    "layer": Part(
        "MoE layer: bfloat16 against float32, GPU against CPU", 55, "numerics:check_layer"
    ),
    "step": Part(
        "training step: bfloat16 against float32, GPU against CPU", 55, "numerics:check_step"
    ),
    "sync": Part("host synchronizations inside the MoE layer", 45, "host_sync:check_host_sync"),
    "speed": Part(
        "MoE layer against other implementations and the roofline",
        150,
        "speed:layer_speed",
        only_measurements=True,
    ),
    "tiny": Part("short training run of preset tiny", 90, "training_runs:tiny_run"),
    "s16": Part("short training run of preset s16", 130, "training_runs:s16_run"),
}
