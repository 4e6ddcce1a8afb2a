"""One case of the test matrix: how a training step is distributed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pretrain.parallel.deepspeed_config import load_profile, profile_path, zero_stage

STAGES = ("0", "1", "2", "3")
Precision = Literal["fp32", "bf16"]
Missing = Literal["none", "pairs", "rank"]
Terms = Literal["all", "aux"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
MISSING: tuple[Missing, ...] = ("none", "pairs", "rank")
TERMS: tuple[Terms, ...] = ("all", "aux")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One combination of parallel layout, precision, missing pairs and loss terms."""

    run: str = "run"
    """Name of the run in `Job.runs`."""
    expert_parallel_size: int = 1
    """Ranks that share one copy of the experts."""
    zero: str = "1"
    """DeepSpeed profile: the part after `zero` in a file name of `ds_configs/`, such as `3` or
    `2_offload`, or the path of a profile."""
    accumulation: int = 1
    """Micro-batches per step on each rank."""
    recompute: bool = False
    """Activation checkpointing."""
    precision: Precision = "fp32"
    missing: Missing = "pairs"
    """Pairs missing from the global batch: none, every fifth one, or all pairs of one rank."""
    terms: Terms = "all"
    """Loss terms to train on: the whole loss, or the auxiliary terms of the routers alone. Their
    gradients are often much smaller than those of the other terms, so in bfloat16 an error in them
    could be hidden by rounding."""

    @property
    def profile(self) -> str:
        """The case's value of `parallel.deepspeed`."""
        return self.zero if self.zero.endswith(".json") else f"zero{self.zero}"

    def label(self, world_size: int) -> str:
        """A short description for the table, such as `2x ep2 zero1 accum4 bf16 recomp gaps`.

        `gaps` stands for `missing=pairs`, and `empty` for `missing=rank`.
        """
        zero = self.zero if len(self.zero) < 12 else self.zero.rsplit("/", 1)[-1]
        parts = [
            f"{world_size}x",
            f"ep{self.expert_parallel_size}",
            f"zero{zero}",
            f"accum{self.accumulation}",
            self.precision,
        ]
        parts += ["recomp"] if self.recompute else []
        parts += {"none": [], "pairs": ["gaps"], "rank": ["empty"]}[self.missing]
        parts += ["aux"] if self.terms == "aux" else []
        return " ".join(parts)


def stage_of(case: Case) -> int:
    """The ZeRO stage of the case's profile.

    Raises:
        ConfigError: The profile does not exist or does not set a stage.
    """
    path = profile_path(case.profile)
    return zero_stage(load_profile(path), path)
