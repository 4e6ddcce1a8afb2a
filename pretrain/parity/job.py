"""What the launcher and the ranks exchange: one `Job` as JSON, and messages as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pretrain.parity.cases import Case
from pretrain.parity.compare import Differences
from pretrain.parity.tolerances import Mismatch

STATUSES = ("ok", "mismatch", "error", "hang", "not-run", "unsupported")
"""Of a case: `error` if a rank failed, `hang` if a rank exceeded the time limit."""
FAILURES = ("mismatch", "error", "hang", "not-run")
"""Statuses that make the check fail."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Cases for the ranks of one world size."""

    runs: dict[str, str]
    """Paths of resolved run files, by name."""
    cases: tuple[Case, ...]
    pairs: int
    """Pairs of the global batch."""
    folder: str
    """Folder of references and messages; on a disk of this node."""
    seconds: float
    """Time limit of one case, and of one reference."""
    first: int = 0
    """Index of the first case to run; earlier ones are finished."""
    float64: bool = True
    """Also train the reference in float64."""

    @staticmethod
    def from_json(text: str) -> Job:
        """The job of `json.dumps(asdict(job))`."""
        values = json.loads(text)
        return Job(**values | {"cases": tuple(Case(**case) for case in values["cases"])})

    def messages_path(self, rank: int) -> Path:
        """The file of JSON lines that a rank writes."""
        return Path(self.folder) / f"rank-{rank:05d}.jsonl"


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one case."""

    case: Case
    world_size: int
    status: str
    """One of `STATUSES`."""
    reason: str = ""
    """Why the case was not compared."""
    seconds: float = 0.0
    differences: Differences = field(default_factory=dict)
    mismatches: tuple[Mismatch, ...] = ()
    reference_stats: dict[str, Any] = field(default_factory=dict)
    """The result of `pretrain.parity.compare.reference_stats`."""

    @property
    def is_failure(self) -> bool:
        """Whether this result makes the check fail."""
        return self.status in FAILURES

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Result:
        """The inverse of `dataclasses.asdict`, after JSON."""
        mismatches = tuple(Mismatch(**mismatch) for mismatch in values["mismatches"])
        return Result(**{**values, "case": Case(**values["case"]), "mismatches": mismatches})


def append_message(path: Path, message: dict[str, Any]) -> None:
    """Append one line; infinite numbers are written as `Infinity`."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(message) + "\n")


def read_messages(path: Path) -> list[dict[str, Any]]:
    """All complete lines so far; none if the file does not exist."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def case_message(index: int, result: Result) -> dict[str, Any]:
    """The message with the result of a case."""
    return {"case": index, "result": asdict(result)}
