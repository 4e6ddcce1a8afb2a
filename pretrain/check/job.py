"""What ranks are given to do, as one JSON file, and what they answer, as lines of JSON. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.check.cells import Cell
from pretrain.check.compare import Difference, Miss, Verdict, Worst

AFTER_THE_CASES = -1
"""Stands for the number of a case in the last words of ranks that were past all cases."""


class Case(NamedTuple):
    """One cell of one run."""

    run: str
    """Name of the run in `Job.runs`."""
    cell: Cell


@dataclass(frozen=True, kw_only=True)
class Job:
    """Cells for the ranks of one world."""

    runs: dict[str, str]
    """Run files, every setting written out, by name."""
    cases: tuple[Case, ...]
    pairs: int
    """Of the global batch."""
    folder: str
    """Where references, answers and last words are written; on this node's disk."""
    seconds: float
    """Longest time for one cell, and for one reference."""
    first: int = 0
    """Number of the first case; those before it are done."""
    float64: bool = True
    """Also train the reference in float64."""

    def to_json(self) -> str:
        """The job as text."""
        cases = [[case.run, case.cell.to_json()] for case in self.cases]
        return json.dumps(vars(self) | {"cases": cases})

    @staticmethod
    def from_json(text: str) -> Job:
        """What `to_json` wrote."""
        values = json.loads(text)
        cases = tuple(Case(run, Cell(**cell)) for run, cell in values.pop("cases"))
        return Job(**values, cases=cases)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one cell."""

    run: str
    world_size: int
    cell: Cell
    status: str
    """`ok`, `miss`, `unsupported`, `error` (a rank failed), `hang` (it took too long) or
    `not-run`."""
    reason: str = ""
    """Why it was not compared, in words."""
    worst: Worst = field(default_factory=dict)
    verdict: Verdict | None = None
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    """What the reference met: pairs, choices, dropped ones, moved biases, clipped steps."""
    each: dict[str, dict[str, float]] = field(default_factory=dict)
    """How far every `term` and every `gradient` of the first step is off, the largest first."""

    @property
    def is_bad(self) -> bool:
        """Whether it must not pass unnoticed."""
        return self.status in ("miss", "error", "hang", "not-run")

    def to_json(self) -> dict[str, Any]:
        """Plain values; infinite numbers as text, which JSON lacks."""
        verdict = self.verdict
        return {
            "run": self.run,
            "world_size": self.world_size,
            "cell": self.cell.to_json(),
            "status": self.status,
            "reason": self.reason,
            "seconds": round(self.seconds, 3),
            "facts": self.facts,
            "worst": {
                quantity: {"value": plain_number(d.value), "name": d.name}
                for quantity, d in self.worst.items()
            },
            "misses": [m._asdict() | {"value": plain_number(m.value)} for m in verdict.misses]
            if verdict
            else [],
            "ties": verdict.ties if verdict else 0,
            "later_ties": verdict.later_ties if verdict else 0,
            "each": {
                quantity: {name: plain_number(value) for name, value in found.items()}
                for quantity, found in self.each.items()
            },
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Outcome:
        """What `to_json` gave."""
        plain = dict(values)
        misses = tuple(
            Miss(m["quantity"], float(m["value"]), m["name"], m["limit"])
            for m in plain.pop("misses")
        )
        verdict = Verdict(misses, plain.pop("ties"), plain.pop("later_ties"))
        worst = {
            quantity: Difference(float(d["value"]), d["name"])
            for quantity, d in plain.pop("worst").items()
        }
        plain["each"] = {
            q: {name: float(far) for name, far in found.items()}
            for q, found in plain["each"].items()
        }
        return Outcome(
            **plain
            | {"cell": Cell(**plain["cell"]), "worst": worst, "verdict": verdict if worst else None}
        )


class Answers:
    """The ranks' answers: one file that rank 0 adds lines to."""

    FILE = "answers.jsonl"

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / self.FILE

    def add(self, value: dict[str, Any]) -> None:
        """One more line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All whole lines so far."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def plain_worst(worst: Worst) -> dict[str, list[Any]]:
    """As JSON has it."""
    return {quantity: [plain_number(d.value), d.name] for quantity, d in worst.items()}


def read_worst(plain: dict[str, list[Any]]) -> Worst:
    """What `plain_worst` made."""
    return {quantity: Difference(float(value), name) for quantity, (value, name) in plain.items()}


def plain_number(value: float) -> float | str:
    """As JSON has it, which knows no infinity."""
    return value if abs(value) < float("inf") else "inf"
