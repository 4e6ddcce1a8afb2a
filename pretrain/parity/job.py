"""The input of the ranks, one JSON file, and their output, JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.parity.cases import Case
from pretrain.parity.compare import Difference, WorstDifferences
from pretrain.parity.tolerances import Mismatch

AFTER_ALL_CASES = -1
"""Replaces the index of a case in the error report of ranks that had finished all cases."""

FAILURES = ("mismatch", "error", "hang", "not-run")
"""Statuses of an `Result` that make the check fail."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Cases for the ranks of one world size."""

    runs: dict[str, str]
    """Paths of resolved run files, by name."""
    cases: tuple[Case, ...]
    pairs: int
    """Pairs of the global batch."""
    folder: str
    """Folder of references, messages and error reports; on a disk of this node."""
    seconds: float
    """Time limit of one case, and of one reference."""
    first: int = 0
    """Index of the first case to run; earlier ones are finished."""
    float64: bool = True
    """Also train the reference in float64."""

    def to_json(self) -> str:
        """The job as JSON text."""
        cases = [case.to_json() for case in self.cases]
        return json.dumps(vars(self) | {"cases": cases})

    @staticmethod
    def from_json(text: str) -> Job:
        """The inverse of `to_json`."""
        values = json.loads(text)
        cases = tuple(Case(**case) for case in values.pop("cases"))
        return Job(**values, cases=cases)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one case."""

    case: Case
    world_size: int
    status: str
    """`ok`, `mismatch`, `unsupported`, `error` (a rank failed), `hang` (a rank exceeded the time
    limit) or `not-run`."""
    reason: str = ""
    """Why the case was not compared."""
    worst: WorstDifferences = field(default_factory=dict)
    mismatches: tuple[Mismatch, ...] = ()
    seconds: float = 0.0
    reference_stats: dict[str, Any] = field(default_factory=dict)
    """The result of `pretrain.parity.compare.reference_stats`."""
    by_name: dict[str, dict[str, float]] = field(default_factory=dict)
    """Difference of every `term` and every `gradient` of the first step, in descending order."""

    @property
    def is_compared(self) -> bool:
        """Whether all ranks finished it."""
        return self.status in ("ok", "mismatch")

    @property
    def is_failure(self) -> bool:
        """Whether this result makes the check fail."""
        return self.status in FAILURES

    def to_json(self) -> dict[str, Any]:
        """A JSON object; infinite numbers become text, because JSON has none."""
        return {
            "world_size": self.world_size,
            "case": self.case.to_json(),
            "status": self.status,
            "reason": self.reason,
            "seconds": round(self.seconds, 3),
            "reference_stats": self.reference_stats,
            "worst": {
                quantity: {"value": json_number(difference.value), "name": difference.name}
                for quantity, difference in self.worst.items()
            },
            "mismatches": [
                mismatch._asdict() | {"value": json_number(mismatch.value)}
                for mismatch in self.mismatches
            ],
            "by_name": by_name_to_json(self.by_name),
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Result:
        """The inverse of `to_json`."""
        fields = dict(values)
        mismatches = tuple(
            Mismatch(m["quantity"], float(m["value"]), m["name"], m["tolerance"])
            for m in fields.pop("mismatches")
        )
        worst = {
            quantity: Difference(float(difference["value"]), difference["name"])
            for quantity, difference in fields.pop("worst").items()
        }
        by_name = {
            quantity: {name: float(value) for name, value in values_by_name.items()}
            for quantity, values_by_name in fields.pop("by_name").items()
        }
        case = Case(**fields.pop("case"))
        return Result(**fields, case=case, worst=worst, by_name=by_name, mismatches=mismatches)


class MessageLog:
    """Messages of a rank: a file of JSON lines."""

    FILE = "messages.jsonl"

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / self.FILE

    def add(self, message: dict[str, Any]) -> None:
        """Append one message."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(message) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All complete lines so far."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def worst_to_json(worst: WorstDifferences) -> dict[str, list[Any]]:
    """Differences as JSON values."""
    return {
        quantity: [json_number(difference.value), difference.name]
        for quantity, difference in worst.items()
    }


def worst_from_json(values: dict[str, list[Any]]) -> WorstDifferences:
    """The inverse of `worst_to_json`."""
    return {quantity: Difference(float(value), name) for quantity, (value, name) in values.items()}


def by_name_to_json(by_name: dict[str, dict[str, float]]) -> dict[str, dict[str, float | str]]:
    """Differences by quantity and name as JSON values."""
    return {
        quantity: {name: json_number(value) for name, value in values.items()}
        for quantity, values in by_name.items()
    }


def json_number(value: float) -> float | str:
    """A JSON value for a number that may be infinite."""
    return value if abs(value) < float("inf") else "inf"
