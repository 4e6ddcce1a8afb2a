"""Results of a part of the GPU suite: checks that pass or fail, and measurements."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.common.json_file import write_json
from tools.measurements import Measurement
from tools.reporting import format_number
from tools.timing import Quartiles

HEADER = ["part", "name", "measured", "expected", "verdict", "note"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check."""

    name: str
    passed: bool
    measured: str = ""
    expected: str = ""
    note: str = ""

    def row(self, part: str) -> list[str]:
        """Table cells in the order of `HEADER`."""
        verdict = "passed" if self.passed else "FAILED"
        return [part, self.name, self.measured, self.expected, verdict, self.note]


def check_at_most(name: str, value: float, limit: float, note: str = "") -> Check:
    """A check that `value` is at most `limit`; NaN fails."""
    return Check(
        name=name,
        passed=value <= limit,
        measured=f"{value:.1e}",
        expected=f"at most {limit:.0e}",
        note=note,
    )


def measurement_row(part: str, measurement: Measurement) -> list[str]:
    """Table cells of a measurement in the order of `HEADER`."""
    relation = "at most" if measurement.less_is_better else "at least"
    bounds = []
    if measurement.floor is not None:
        bounds.append(f"{relation} {format_number(measurement.floor)}")
    if measurement.goal is not None:
        bounds.append(f"goal {format_number(measurement.goal)}")
    value = "-"
    if measurement.value is not None:
        value = f"{measurement.value} {measurement.unit}".strip()
    return [
        part,
        measurement.name,
        value,
        ", ".join(bounds),
        measurement.verdict(),
        measurement.note,
    ]


@dataclass
class Report:
    """Results of one part.

    The file at `path` is updated after each result, so a part that is killed leaves its results so
    far.
    """

    path: Path | None = None
    checks: list[Check] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    skipped: str = ""
    """Reason why the part did not run."""

    def add(self, *results: Check | Measurement) -> None:
        """Append results and update the file."""
        for result in results:
            if isinstance(result, Check):
                self.checks.append(result)
            else:
                self.measurements.append(result)
        self.write()

    def skip(self, reason: str) -> None:
        """Mark the part as skipped and update the file."""
        self.skipped = reason
        self.write()

    def write(self) -> None:
        """Write the file, if there is a path."""
        if self.path is not None:
            write_json(self.path, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """JSON object; the inverse of `from_json`."""
        return {
            "skipped": self.skipped,
            "checks": [asdict(check) for check in self.checks],
            "measurements": [measurement.to_json() for measurement in self.measurements],
        }

    @staticmethod
    def from_json(contents: dict[str, Any]) -> Report:
        """Restore a report from `to_json`."""
        measurements = []
        for row in contents["measurements"]:
            fields = {key: value for key, value in row.items() if key != "verdict"}
            if row["value"] is not None:
                fields["value"] = Quartiles(**row["value"])
            measurements.append(Measurement(**fields))
        return Report(
            checks=[Check(**check) for check in contents["checks"]],
            measurements=measurements,
            skipped=contents["skipped"],
        )
