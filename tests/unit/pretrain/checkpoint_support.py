"""Engines without machines: ranks are threads, and tensors are small."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class FakeLayout:
    world_size: int = 1
    expert_parallel_size: int = 1
    zero_stage: int = 1
    precision: str = "fp32"
    num_experts: int = 2

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class World:
    """What the ranks of one fake world share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.notes: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def run(self, work: Callable[[int], R]) -> list[R | BaseException]:
        """What `work(rank)` gave or raised, for every rank, each in a thread of its own."""

        def guarded(rank: int) -> R | BaseException:
            try:
                return work(rank)
            except BaseException as error:  # noqa: BLE001 - tests look at it
                return error

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(guarded, range(self.size)))


class FakeEngine:
    """Dense weights on rank 0, two of the experts on each rank, an optimizer shard on each."""

    def __init__(self, world_size: World, rank: int, *, value: float = 0.0, **layout: Any) -> None:
        self.rank, self.world_size = rank, world_size.size
        usual = {"expert_parallel_size": world_size.size, "num_experts": 2 * world_size.size}
        self.layout = FakeLayout(world_size=world_size.size, **(usual | layout))
        self._shared = world_size
        self.dense = torch.arange(6.0).reshape(2, 3) + value
        self.experts = torch.full((2, 3), 10.0 * rank + value)
        self.moments = {
            "moment": torch.full((5,), rank + value, dtype=torch.float64),
            "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
            "steps": torch.tensor(7, dtype=torch.int64),
            "empty": torch.zeros(0, 4),
        }
        self.loaded_names: list[str] = []

    def model_tensors(self) -> Mapping[str, Tensor]:
        first = 2 * self.rank
        mine = {f"block.experts.w1@{first}:{first + 2}": self.experts}
        return mine | ({"dense": self.dense} if self.rank == 0 else {})

    def optimizer_tensors(self) -> Mapping[str, Tensor]:
        return self.moments

    def load_model_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        first = 2 * self.rank
        self.loaded_names = sorted(tensors)
        self.dense = tensors["dense"]
        self.experts = tensors[f"block.experts.w1@{first}:{first + 2}"]

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.moments = dict(tensors)

    def gather_json(self, value: Any) -> list[Any]:
        self._shared.notes[self.rank] = value
        self._shared.barrier.wait()
        notes = list(self._shared.notes)
        self._shared.barrier.wait()
        return notes


def one_rank(*, value: float = 0.0, **layout: Any) -> FakeEngine:
    """An engine that is alone."""
    return FakeEngine(World(1), 0, value=value, **layout)
