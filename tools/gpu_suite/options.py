"""Options of one part of the GPU suite."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Options:
    """Device, time limit and folder of a part."""

    device: torch.device
    deadline: float
    """Value of `time.monotonic()` after which nothing new is started."""
    scratch: Path
    """Folder for data; all parts of a run use the same one."""

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU; on a CPU, sizes are minimal, to test that the part runs."""
        return self.device.type == "cuda"

    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()
