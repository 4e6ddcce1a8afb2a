"""What a measure gives: figures with their spread and bounds, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.benchmark import Quartiles, figure


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure."""

    root: Path
    """Where data are written and found again."""
    repeats: int
    """Rounds of each comparison."""
    quick: bool = False
    """Try the machinery on hardly any data; the figures mean nothing then."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the report."""

    name: str
    value: Quartiles | None
    """None: it could not be measured here, and `note` says why."""
    unit: str = ""
    floor: float | None = None
    """What it must reach."""
    goal: float | None = None
    """What it should reach."""
    less_is_better: bool = False
    note: str = ""

    def verdict(self) -> str:
        """How the median stands to floor and goal."""
        if self.value is None:
            return "not measured"
        sign = -1 if self.less_is_better else 1
        if self.goal is not None and sign * self.value.median >= sign * self.goal:
            return "goal"
        if self.floor is None:
            return ""
        return "floor" if sign * self.value.median >= sign * self.floor else "MISSED"

    def row(self) -> list[str]:
        """Cells of the table under `HEAD`."""
        bounds = [f"{figure(bound)}" if bound is not None else "" for bound in (self.floor, self.goal)]
        value = "-" if self.value is None else f"{self.value}"
        return [self.name, value, self.unit, *bounds, self.verdict(), self.note]

    def to_json(self) -> dict[str, Any]:
        """For the report in a file."""
        value = None if self.value is None else self.value._asdict()
        return {
            "name": self.name, "value": value, "unit": self.unit, "floor": self.floor, "goal": self.goal,
            "less_is_better": self.less_is_better, "verdict": self.verdict(), "note": self.note,
        }  # fmt: skip


HEAD = ["figure", "median (quartiles)", "unit", "floor", "goal", "reaches", "note"]

Measure = Callable[[Options], Iterator[Figure]]


def skipped(name: str, why: str) -> Figure:
    """A figure that cannot be had here."""
    return Figure(name=name, value=None, note=why)
