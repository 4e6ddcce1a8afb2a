"""Options of a loader benchmark, and the signature of its entry point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.measurements import Measurement


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of one benchmark run."""

    root: Path
    """Folder of generated data; reused by later runs."""
    repeats: int
    """Recorded rounds of each comparison."""
    quick: bool = False
    """Use minimal data, to test that the benchmark runs; its measurements are meaningless."""


Benchmark = Callable[[Options], Iterator[Measurement]]
