"""Collects results while cases run: prints rows and writes the JSON report after each case."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.logs import Progress
from pretrain.parity import report
from pretrain.parity.compare import WorstDifferences
from pretrain.parity.job import Result, worst_from_json

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Collector:
    """Results of all cases so far."""

    metadata: dict[str, Any]
    """Top-level entries of the JSON report: run file, overrides, options."""
    out: Path | None
    """The JSON report; None writes none."""
    is_rank_zero: bool
    """Other ranks print and write nothing."""
    results: list[Result] = field(default_factory=list)
    float32_errors: dict[str, WorstDifferences] = field(default_factory=dict)
    """Rounding error of each run's float32 reference."""
    rank_failures: list[str] = field(default_factory=list)
    """Failures of ranks after their last case."""
    progress: Progress | None = None
    """Progress over the cases of the current world size; on rank 0."""

    def __post_init__(self) -> None:
        self.width = shutil.get_terminal_size((report.FULL_WIDTH, 40)).columns

    def print_header(self) -> None:
        """Print the table's header."""
        self._print(*report.header(self.width))

    def start_world_size(self, world_size: int, num_cases: int) -> None:
        """Start the progress of a world size. Starting ranks takes a while, so it is logged."""
        if self.is_rank_zero:
            logger.info("comparing %d cases; starting %d ranks", num_cases, world_size)
            self.progress = Progress(f"{world_size} ranks", num_cases, "cases")

    def handle_message(self, message: dict[str, Any]) -> None:
        """Process a message of `pretrain.parity.worker.run_job` or `launch_local_ranks`."""
        if "result" in message:
            self.add(Result.from_json(message["result"]))
            if self.progress is not None:
                self.progress.update()
        elif "float32_error" in message:
            self.float32_errors[message["float32_error"]] = worst_from_json(message["worst"])
        elif "float32_error_unavailable" in message:
            self._print(f"no float64 reference: {message['float32_error_unavailable']}")
        else:
            self.rank_failures.append(message["rank_failure"])
            self._print(f"ranks failed after the last case: {message['rank_failure']}")

    def add(self, result: Result) -> None:
        """Store and print an result, and update the JSON report."""
        self.results.append(result)
        self._print(report.row(result, self.width), *report.mismatch_lines(result))
        self._write(complete=False)

    def finish(self) -> None:
        """Print the summary and write the final JSON report."""
        self._write(complete=True)
        self._print(*report.summary(self.results, self.float32_errors, self.width))

    @property
    def is_ok(self) -> bool:
        """Whether at least one case was compared and nothing failed."""
        compared = any(result.status == "ok" for result in self.results)
        failed = any(result.is_failure for result in self.results)
        return compared and not failed and not self.rank_failures

    def _print(self, *lines: str) -> None:
        if self.is_rank_zero:
            for line in lines:
                print(line, flush=True)

    def _write(self, *, complete: bool) -> None:
        if self.out is not None and self.is_rank_zero:
            values = report.as_json(
                self.results, self.float32_errors, self.metadata, complete=complete
            )
            storage.write_bytes(str(self.out), json.dumps(values, indent=2).encode() + b"\n")
