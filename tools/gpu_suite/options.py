"""What every part is told."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a part is to run."""

    device: torch.device
    deadline: float
    """`time.monotonic()` after which nothing new is begun."""
    scratch: Path
    """A folder for data, kept from part to part."""

    @property
    def on_gpu(self) -> bool:
        """Whether sizes are real; on CPU the machinery is tried on hardly anything."""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.monotonic()
