"""Communication between the ranks of a run: `Communicator`.

`LocalCommunicator` is one process without a process group; `TorchCommunicator` uses the default
process group of torch.distributed. Every method is collective: all ranks call it in the same order.
"""

from __future__ import annotations

import json
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.parallel.collectives import all_gather_rows


class Communicator(Protocol):
    """Rank, device and collectives of one rank."""

    rank: int
    world_size: int
    device: torch.device

    def all_gather(self, rows: Tensor) -> Tensor:
        """Concatenate the rows of all ranks along dim 0, in rank order.

        Differentiable: gradients are summed over ranks and returned to the rank of each row.
        """
        ...

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, without gradient."""
        ...

    def any_true(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on any rank."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        ...

    def all_gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        ...


class LocalCommunicator:
    """A single process."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world_size, self.device = 0, 1, device

    def all_gather(self, rows: Tensor) -> Tensor:
        return rows

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return values.detach()

    def any_true(self, *flags: bool) -> tuple[bool, ...]:
        return flags

    def barrier(self) -> None:
        return None

    def broadcast_json(self, value: Any) -> Any:
        return value

    def all_gather_json(self, value: Any) -> list[Any]:
        return [value]


class TorchCommunicator:
    """The default process group, which must be initialized."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world_size, self.device = dist.get_rank(), dist.get_world_size(), device

    def all_gather(self, rows: Tensor) -> Tensor:
        return all_gather_rows(rows)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        summed = values.detach().clone()
        dist.all_reduce(summed)
        return summed

    def any_true(self, *flags: bool) -> tuple[bool, ...]:
        counts = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(counts)
        return tuple(count > 0 for count in counts.tolist())

    def barrier(self) -> None:
        dist.barrier()

    def broadcast_json(self, value: Any) -> Any:
        return self.all_gather_json(value if self.rank == 0 else None)[0]

    def all_gather_json(self, value: Any) -> list[Any]:
        # Sent as JSON text: torch's own functions for objects use pickle.
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        data = data.to(self.device)
        size = torch.tensor([data.numel()], device=self.device)
        sizes = [torch.zeros_like(size) for _ in range(self.world_size)]
        dist.all_gather(sizes, size)

        padded = torch.zeros(max(int(s) for s in sizes), dtype=torch.uint8, device=self.device)
        padded[: data.numel()] = data
        buffers = [torch.zeros_like(padded) for _ in sizes]
        dist.all_gather(buffers, padded)
        return [
            json.loads(bytes(buffer[: int(s)].cpu().tolist()))
            for buffer, s in zip(buffers, sizes, strict=True)
        ]
