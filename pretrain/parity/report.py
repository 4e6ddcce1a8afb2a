"""The report of a check: a table with one row per case as it finishes, and a JSON file."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.common.json_file import write_json
from data_pipeline.common.logs import Progress
from data_pipeline.common.tables import counted, format_table
from pretrain.parity.compare import MIN_GRADIENT_RATIO, MIN_TERM, largest
from pretrain.parity.job import STATUSES, Result
from pretrain.parity.tolerances import TOLERANCES

logger = logging.getLogger(__name__)

COLUMNS = {"loss": 5, "term": 5, "norm": 5, "gradient": 8, "update": 7, "assignments": 4}
"""Quantities in the table, with the widths of their columns."""
MAX_NAMES = 5
"""Names that are listed below a mismatch."""
MAX_JSON_NAMES = 20
"""Names with the largest differences that the JSON lists; of terms and gradients it lists all."""
_LABEL = 36
_PRECISIONS = ("fp32", "bf16")
_ROUNDED = ("loss", "term", "norm", "gradient", "assignments")
"""Quantities whose rounding error in float32 is printed."""


@dataclass(kw_only=True)
class Report:
    """Results of all cases so far; rank 0 prints a row and writes the JSON after each case."""

    metadata: dict[str, Any]
    """Top-level entries of the JSON: run file, overrides, options."""
    out: Path | None
    """The JSON file; None writes none."""
    is_rank_zero: bool
    """Other ranks print and write nothing."""
    results: list[Result] = field(default_factory=list)
    float32_errors: dict[str, dict[str, float]] = field(default_factory=dict)
    """Rounding error of each run's float32 reference, by quantity."""
    rank_failures: list[str] = field(default_factory=list)
    """Failures of ranks after their last case."""
    progress: Progress | None = None

    def print_header(self) -> None:
        """Print the table's header."""
        names = {"update": "weights", "assignments": "ties"}
        columns = [names.get(name, name).rjust(width) for name, width in COLUMNS.items()]
        line = " ".join(["case".ljust(_LABEL), *columns, "result"])
        self._print(line, "-" * len(line))

    def start_world_size(self, world_size: int, num_cases: int) -> None:
        """Start the progress of a world size. Starting ranks takes a while, so it is logged."""
        if self.is_rank_zero:
            logger.info(
                "comparing %s; starting %s", counted(num_cases, "case"), counted(world_size, "rank")
            )
            self.progress = Progress(counted(world_size, "rank"), num_cases, "cases")

    def handle_message(self, message: dict[str, Any]) -> None:
        """Process a message of `pretrain.parity.worker.run_job` or `launch_local_ranks`."""
        if "result" in message:
            self.add(Result.from_json(message["result"]))
            if self.progress is not None:
                self.progress.update()
        elif "float32_error" in message:
            self.float32_errors[message["run"]] = message["float32_error"]
        elif "no_float64_reference" in message:
            self._print(f"no float64 reference: {message['no_float64_reference']}")
        else:
            self.rank_failures.append(message["failure"])
            self._print(f"ranks failed after the last case: {message['failure']}")

    def add(self, result: Result) -> None:
        """Store and print a result, and update the JSON file."""
        self.results.append(result)
        self._print(row(result), *mismatch_lines(result))
        self._write(complete=False)

    def finish(self) -> None:
        """Print the summary and write the final JSON file."""
        self._write(complete=True)
        self._print(*self.summary())

    def summary(self) -> list[str]:
        """Lines below the table: tolerances, error of the reference, number of cases by status."""
        lines = ["", *_tolerances(), ""]
        for name, error in self.float32_errors.items():
            values = ", ".join(f"{key} {_format(error.get(key, 0.0))}" for key in _ROUNDED)
            lines.append(f"rounding error of the float32 reference ({name}): {values}")
            if max(error.get(key, 0.0) for key in _ROUNDED[:4]) > TOLERANCES["gradient"]["fp32"]:
                lines.append("It exceeds the fp32 tolerance: rounding alone may cause a mismatch.")

        statuses = [result.status for result in self.results]
        if not {"ok", "mismatch"} & set(statuses):
            lines.append("No case was compared; select cases that this number of ranks supports.")
        counts = ", ".join(f"{statuses.count(s)} {s}" for s in STATUSES if s in statuses)
        return [*lines, f"{counted(len(statuses), 'case')}: {counts or 'none'}"]

    @property
    def is_ok(self) -> bool:
        """Whether at least one case was compared and nothing failed."""
        compared = any(result.status == "ok" for result in self.results)
        failed = any(result.is_failure for result in self.results)
        return compared and not failed and not self.rank_failures

    def as_json(self, *, complete: bool) -> dict[str, Any]:
        """The report as a JSON object; `complete` is false until all cases are done."""
        return {
            "version": 2,
            **self.metadata,
            "complete": complete,
            "tolerances": TOLERANCES,
            "float32_errors": self.float32_errors,
            "cases": [_result_json(result) for result in self.results],
        }

    def _print(self, *lines: str) -> None:
        if self.is_rank_zero:
            print("\n".join(lines), flush=True)

    def _write(self, *, complete: bool) -> None:
        if self.out is not None and self.is_rank_zero:
            write_json(self.out, _without_infinity(self.as_json(complete=complete)))


def row(result: Result) -> str:
    """One result in one line: the largest difference of each quantity."""
    label = result.case.label(result.world_size).ljust(_LABEL)
    if result.status not in ("ok", "mismatch"):
        status = result.status.upper() if result.is_failure else result.status
        return f"{label} {status}: {result.reason}"
    numbers = [
        _format(largest(result.differences, name)[1]).rjust(width)
        for name, width in COLUMNS.items()
    ]
    mismatches = ", ".join(mismatch.quantity for mismatch in result.mismatches)
    return " ".join([label, *numbers, f"MISMATCH: {mismatches}" if mismatches else "ok"])


def mismatch_lines(result: Result) -> list[str]:
    """Lines below the row of a mismatch: each quantity with its difference and tolerance."""
    lines = []
    for mismatch in result.mismatches:
        by_name = result.differences[mismatch.quantity]
        above = [name for name, value in by_name.items() if not value <= mismatch.tolerance]
        names = ", ".join(above[:MAX_NAMES])
        more = f" and {len(above) - MAX_NAMES} more" if len(above) > MAX_NAMES else ""
        lines.append(
            f"    {mismatch.quantity}: difference {mismatch.value:.2g}, tolerance "
            f"{mismatch.tolerance:.2g}, in {len(above)} of {len(by_name)}: {names}{more}"
        )
    return lines


def _tolerances() -> Sequence[str]:
    """The tolerances as a table, with what they are relative to."""
    rows: dict[tuple[str, str], list[str]] = {}
    for quantity, by_precision in TOLERANCES.items():
        values = tuple(f"{by_precision[p]:g}" if p in by_precision else "" for p in _PRECISIONS)
        rows.setdefault((values[0], values[1]), []).append(quantity)
    table = format_table(
        ["fp32", "bf16", "tolerance of"],
        [[*values, ", ".join(quantities)] for values, quantities in rows.items()],
        align="rrl",
    )
    return [
        *table.splitlines(),
        "",
        "Differences are relative to one process without DeepSpeed, with the same expert",
        "assignments; of update, to the norm of the update; of biases, absolute. Terms below",
        f"{MIN_TERM:g} are compared as if they were {MIN_TERM:g}, gradients below "
        f"{MIN_GRADIENT_RATIO:g} of the global",
        "norm as if they had that norm. Of assignments, the fraction that a run itself would",
        "select otherwise (ties); one may always differ.",
    ]


def _result_json(result: Result) -> dict[str, Any]:
    limits = {"term": None, "gradient": None}
    differences = {
        quantity: dict(list(by_name.items())[: limits.get(quantity, MAX_JSON_NAMES)])
        for quantity, by_name in result.differences.items()
    }
    return asdict(result) | {"differences": differences}


def _without_infinity(value: Any) -> Any:
    """The value with `"inf"` for infinite numbers, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _without_infinity(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(item) for item in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def _format(value: float) -> str:
    """One digit and the power of ten; integers below 1e5 as they are."""
    return str(int(value)) if value < 1e5 and value == int(value) else f"{value:.0e}"
