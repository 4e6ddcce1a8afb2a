"""A benchmark result: quartiles with a floor and a goal, or the reason why it was not measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tools.reporting import format_number
from tools.timing import Quartiles


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row of a benchmark report."""

    name: str
    value: Quartiles | None
    """None if it was not measured; `note` gives the reason."""
    unit: str = ""
    floor: float | None = None
    """Required value: a minimum, or a maximum with `less_is_better`."""
    goal: float | None = None
    """Desired value, stricter than `floor`."""
    less_is_better: bool = False
    note: str = ""

    def verdict(self) -> str:
        """Compare the median with `floor` and `goal`."""
        if self.value is None:
            return "not measured"
        sign = -1 if self.less_is_better else 1
        if self.goal is not None and sign * self.value.median >= sign * self.goal:
            return "goal"
        if self.floor is None:
            return ""
        return "floor" if sign * self.value.median >= sign * self.floor else "MISSED"

    def row(self) -> list[str]:
        """Table cells in the order of `HEADER`."""
        bounds = [
            "" if bound is None else format_number(bound) for bound in (self.floor, self.goal)
        ]
        value = "-" if self.value is None else str(self.value)
        return [self.name, value, self.unit, *bounds, self.verdict(), self.note]

    def to_json(self) -> dict[str, Any]:
        """JSON object for the report file."""
        return {
            "name": self.name,
            "value": None if self.value is None else self.value._asdict(),
            "unit": self.unit,
            "floor": self.floor,
            "goal": self.goal,
            "less_is_better": self.less_is_better,
            "verdict": self.verdict(),
            "note": self.note,
        }


HEADER = ["measurement", "median (quartiles)", "unit", "floor", "goal", "verdict", "note"]


def not_measured(name: str, reason: str) -> Measurement:
    """A row for something that could not be measured."""
    return Measurement(name=name, value=None, note=reason)
