"""Fake engines for checkpoint tests: ranks are threads, and tensors are small."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from pretrain.parallel.state_fragments import MOMENTS, WEIGHT, Fragment, StateReader

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
    """Dense weights on rank 0, and two experts with moments on each rank."""

    def __init__(self, world: FakeWorld, rank: int, *, value: float = 0.0, **layout: Any) -> None:
        self.communicator = FakeCommunicator(world, rank)
        defaults = {"expert_parallel_size": world.size, "num_experts": 2 * world.size}
        self.layout = FakeLayout(world_size=world.size, **(defaults | layout))
        self._rank = rank
        self.dense = torch.arange(6.0).reshape(2, 3) + value
        self.experts = torch.full((2, 3), 10.0 * rank + value)
        self.moments = {kind: torch.full((6,), rank + value) for kind in MOMENTS}
        self.error: Exception | None = None
        """Raised when this rank's state is saved."""
        self.is_loaded = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"dense": (2, 3), "block.experts.w1": (self.layout.num_experts, 3)}

    def state_fragments(self) -> Iterator[Fragment]:
        if self.error:
            raise self.error
        if self._rank == 0:
            yield Fragment("dense", 0, {WEIGHT: self.dense.view(-1)})
        values = {WEIGHT: self.experts.view(-1)} | self.moments
        yield Fragment("block.experts.w1", 6 * self._rank, values, steps=7)

    def load_state(self, reader: StateReader) -> None:
        name, first = "block.experts.w1", 6 * self._rank
        self.dense = reader.read("dense", WEIGHT, 0, 6).view(2, 3)
        self.experts = reader.read(name, WEIGHT, first, 6).view(2, 3)
        self.moments = {kind: reader.read(name, kind, first, 6) for kind in MOMENTS}
        assert (reader.steps("dense"), reader.steps(name)) == (0, 7)
        self.is_loaded = True


def one_rank(*, value: float = 0.0, **layout: Any) -> FakeEngine:
    """An engine with a world size of 1."""
    return FakeEngine(FakeWorld(1), 0, value=value, **layout)


def flip_last_bit(path: Path) -> None:
    """Corrupt a file in its last bit."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
