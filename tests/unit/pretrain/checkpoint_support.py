"""Fake engines for checkpoint tests: ranks are threads, and tensors are small."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
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


class FakeWorld:
    """State shared by the ranks of one fake process group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def run(self, work: Callable[[int], R]) -> list[R | BaseException]:
        """The result or exception of `work(rank)` for every rank, each run in its own thread."""

        def run_rank(rank: int) -> R | BaseException:
            try:
                return work(rank)
            except BaseException as error:  # noqa: BLE001 - the tests check it
                return error

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(run_rank, range(self.size)))


class FakeCommunicator:
    """The collective that checkpoints use, between threads."""

    def __init__(self, world: FakeWorld, rank: int) -> None:
        self.rank, self.world_size = rank, world.size
        self._world = world

    def all_gather_json(self, value: Any) -> list[Any]:
        self._world.values[self.rank] = value
        self._world.barrier.wait()
        values = list(self._world.values)
        self._world.barrier.wait()
        return values


class FakeEngine:
    """Dense weights on rank 0, two experts and an optimizer shard on each rank."""

    def __init__(self, world: FakeWorld, rank: int, *, value: float = 0.0, **layout: Any) -> None:
        self.communicator = FakeCommunicator(world, rank)
        defaults = {"expert_parallel_size": world.size, "num_experts": 2 * world.size}
        self.layout = FakeLayout(world_size=world.size, **(defaults | layout))
        self._rank = rank
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
        first = 2 * self._rank
        tensors = {f"block.experts.w1@{first}:{first + 2}": self.experts}
        return tensors | ({"dense": self.dense} if self._rank == 0 else {})

    def optimizer_tensors(self) -> Mapping[str, Tensor]:
        return self.moments

    def load_model_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        first = 2 * self._rank
        self.loaded_names = sorted(tensors)
        self.dense = tensors["dense"]
        self.experts = tensors[f"block.experts.w1@{first}:{first + 2}"]

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.moments = dict(tensors)


def one_rank(*, value: float = 0.0, **layout: Any) -> FakeEngine:
    """An engine with a world size of 1."""
    return FakeEngine(FakeWorld(1), 0, value=value, **layout)


def flip_last_bit(path: Path) -> None:
    """Corrupt a file in its last bit."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
