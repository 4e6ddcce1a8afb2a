"""Figures with their spread and bounds, or the reason why there is none: what every benchmark
reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tools.benchmark import Quartiles, figure


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
        bounds = [
            f"{figure(bound)}" if bound is not None else "" for bound in (self.floor, self.goal)
        ]
        value = "-" if self.value is None else f"{self.value}"
        return [self.name, value, self.unit, *bounds, self.verdict(), self.note]

    def to_json(self) -> dict[str, Any]:
        """For the report in a file."""
        value = None if self.value is None else self.value._asdict()
        return {
            "name": self.name,
            "value": value,
            "unit": self.unit,
            "floor": self.floor,
            "goal": self.goal,
            "less_is_better": self.less_is_better,
            "verdict": self.verdict(),
            "note": self.note,
        }


HEAD = ["figure", "median (quartiles)", "unit", "floor", "goal", "reaches", "note"]


def skipped(name: str, why: str) -> Figure:
    """A figure that cannot be had here."""
    return Figure(name=name, value=None, note=why)
