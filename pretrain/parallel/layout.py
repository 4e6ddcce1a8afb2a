"""Where a rank stands: pure arithmetic from its number.

Every rank is a data-parallel rank. Ranks `[0..E)`, `[E..2E)`, ... form expert-parallel groups of
size E, each holding one copy of all experts, cut in equal slices: consecutive ranks, so that a
group stays inside a node when E divides the GPUs of a node.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.common.errors import LayoutError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is laid over ranks; a checkpoint belongs to one layout."""

    world_size: int
    """Ranks."""
    expert_parallel_size: int
    """Ranks that share one copy of the experts."""
    zero_stage: int
    """DeepSpeed ZeRO stage; -1 for the plain engine."""
    precision: str
    """`fp32` or `bf16`."""
    num_experts: int
    """Routed experts of a layer."""
    expert_layer: str = "ours"
    """Whose MoE layer trains, `ours` or `deepspeed`: shards of the optimizer have another order in
    each."""

    def __post_init__(self) -> None:
        if self.world_size % self.expert_parallel_size:
            raise LayoutError(
                f"{self.world_size} ranks were started, but parallel.expert_parallel_size is {self.expert_parallel_size}: "
                f"the ranks cannot be split into groups of that size; start a multiple of "
                f"{self.expert_parallel_size} ranks or change parallel.expert_parallel_size"
            )
        if self.num_experts % self.expert_parallel_size:
            raise LayoutError(
                f"moe.num_experts is {self.num_experts}, which cannot be split over "
                f"parallel.expert_parallel_size = {self.expert_parallel_size} ranks; use a divisor of {self.num_experts}"
            )

    @property
    def experts_per_rank(self) -> int:
        """Routed experts that one rank holds of each layer."""
        return self.num_experts // self.expert_parallel_size

    def expert_rank(self, rank: int) -> int:
        """Place of `rank` in its expert-parallel group."""
        return rank % self.expert_parallel_size

    def first_expert(self, rank: int) -> int:
        """Global number of the first expert that `rank` holds."""
        return self.expert_rank(rank) * self.experts_per_rank

    def writes_experts(self, rank: int) -> bool:
        """Whether `rank` is the one that saves its slice of the experts (the first copy)."""
        return rank < self.expert_parallel_size

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `Layout(**object)` turns back."""
        facts = asdict(self)
        if self.expert_layer == "ours":
            del facts["expert_layer"]  # which older checkpoints do not name
        return facts
