"""What a part has to tell: checks that pass or fail, and figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.benchmark import figure, write_json
from tools.figures import Figure

HEAD = ["part", "what", "measured", "asked", "verdict", "note"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """Something that must hold."""

    name: str
    passed: bool
    measured: str = ""
    asked: str = ""
    note: str = ""

    def row(self, part: str) -> list[str]:
        """Cells of the table under `HEAD`."""
        return [
            part,
            self.name,
            self.measured,
            self.asked,
            "passed" if self.passed else "FAILED",
            self.note,
        ]


def at_most(name: str, value: float, limit: float, note: str = "") -> Check:
    """A check that a number is finite and small enough."""
    return Check(
        name=name,
        passed=value <= limit,
        measured=f"{value:.1e}",
        asked=f"at most {limit:.0e}",
        note=note,
    )


def figure_row(part: str, line: Figure) -> list[str]:
    """A figure's cells under `HEAD`."""
    kind = "at most" if line.less_is_better else "at least"
    bounds = [
        f"{kind} {figure(line.floor)}" if line.floor is not None else "",
        f"goal {figure(line.goal)}" if line.goal is not None else "",
    ]
    value = "-" if line.value is None else f"{line.value} {line.unit}".strip()
    return [part, line.name, value, ", ".join(filter(None, bounds)), line.verdict(), line.note]


@dataclass
class Report:
    """Results of one part, written to a file after each one: a part that is ended leaves what it
    has."""

    path: Path | None = None
    checks: list[Check] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    skipped: str = ""
    """Why the part could not run at all."""

    def add(self, *results: Check | Figure) -> None:
        """Keep results."""
        self.checks += [each for each in results if isinstance(each, Check)]
        self.figures += [each for each in results if isinstance(each, Figure)]
        self.write()

    def skip(self, why: str) -> None:
        """Say why the part could not run."""
        self.skipped = why
        self.write()

    def write(self) -> None:
        """Bring the file up to date."""
        if self.path is not None:
            write_json(self.path, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """For the file; `from_json` turns it back."""
        return {
            "skipped": self.skipped,
            "checks": [asdict(check) for check in self.checks],
            "figures": [line.to_json() for line in self.figures],
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> Report:
        """What `to_json` gave."""
        from tools.benchmark import Quartiles

        figures = []
        for line in value["figures"]:
            given = {key: item for key, item in line.items() if key != "verdict"}
            figures.append(
                Figure(**given | {"value": Quartiles(**line["value"]) if line["value"] else None})
            )
        return Report(
            checks=[Check(**check) for check in value["checks"]],
            figures=figures,
            skipped=value["skipped"],
        )
