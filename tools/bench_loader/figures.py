"""What a measure of the loader is told, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.figures import HEAD, Figure, skipped

__all__ = ["HEAD", "Figure", "Measure", "Options", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure."""

    root: Path
    """Where data are written and found again."""
    repeats: int
    """Rounds of each comparison."""
    quick: bool = False
    """Try the machinery on hardly any data; the figures mean nothing then."""


Measure = Callable[[Options], Iterator[Figure]]
