"""Parallel layout: which experts and which data a rank holds, computed from its rank.

Every rank is a data-parallel rank. Ranks `[0..E)`, `[E..2E)`, ... form expert-parallel groups of
size E. Each group holds one copy of all experts, split into equal slices. Groups consist of
consecutive ranks, so that a group stays inside one node when E divides the GPUs of a node.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.common.tables import counted
from pretrain.parallel.errors import LayoutError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Parallel layout of a run."""

    world_size: int
    """Number of ranks."""
    expert_parallel_size: int
    """Number of ranks over which one copy of the experts is split."""
    zero_stage: int
    """DeepSpeed ZeRO stage; -1 for the plain engine."""
    precision: str
    """`fp32` or `bf16`."""
    num_experts: int
    """Number of routed experts per layer (`moe.num_experts`)."""

    def __post_init__(self) -> None:
        if self.world_size % self.expert_parallel_size:
            raise LayoutError(
                f"the run was started with {counted(self.world_size, 'rank')}, but "
                f"parallel.expert_parallel_size is {self.expert_parallel_size}: ranks cannot be "
                f"split into groups of that size; start a multiple of {self.expert_parallel_size} "
                f"ranks or change parallel.expert_parallel_size"
            )
        if self.num_experts % self.expert_parallel_size:
            raise LayoutError(
                f"moe.num_experts is {self.num_experts}, which cannot be split over "
                f"parallel.expert_parallel_size = {self.expert_parallel_size} ranks; "
                f"use a divisor of {self.num_experts}"
            )

    @property
    def experts_per_rank(self) -> int:
        """Number of routed experts per layer that one rank holds."""
        return self.num_experts // self.expert_parallel_size

    def expert_rank(self, rank: int) -> int:
        """Rank of `rank` within its expert-parallel group."""
        return rank % self.expert_parallel_size

    def first_expert(self, rank: int) -> int:
        """Global index of the first expert that `rank` holds."""
        return self.expert_rank(rank) * self.experts_per_rank

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `Layout(**object)` restores the layout."""
        return asdict(self)
