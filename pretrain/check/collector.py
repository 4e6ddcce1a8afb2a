"""Collects outcomes while cells run: prints rows and writes the JSON report after each cell."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.logs import Progress
from pretrain.check import report
from pretrain.check.compare import WorstDifferences
from pretrain.check.job import Outcome, worst_from_json

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Collector:
    """Outcomes of all cells so far."""

    metadata: dict[str, Any]
    """Top-level entries of the JSON report: run file, overrides, options."""
    out: Path | None
    """The JSON report; None writes none."""
    is_rank_zero: bool
    """Other ranks print and write nothing."""
    outcomes: list[Outcome] = field(default_factory=list)
    float32_errors: dict[str, WorstDifferences] = field(default_factory=dict)
    """Rounding error of each run's float32 reference."""
    rank_failures: list[str] = field(default_factory=list)
    """Failures of ranks after their last case."""
    progress: Progress | None = None
    """Progress over the cells of the current world size; on rank 0."""

    def __post_init__(self) -> None:
        self.width = shutil.get_terminal_size((report.FULL_WIDTH, 40)).columns

    def print_header(self) -> None:
        """Print the table's header."""
        self._print(*report.header(self.width))

    def start_world_size(self, world_size: int, num_cells: int) -> None:
        """Start the progress of a world size. Starting ranks takes a while, so it is logged."""
        if self.is_rank_zero:
            logger.info("comparing %d cells; starting %d ranks", num_cells, world_size)
            self.progress = Progress(f"{world_size} ranks", num_cells, "cells")

    def handle_message(self, message: dict[str, Any]) -> None:
        """Process a message of `pretrain.check.worker.run_job` or `launch_local_ranks`."""
        if "outcome" in message:
            self.add(Outcome.from_json(message["outcome"]))
            if self.progress is not None:
                self.progress.update()
        elif "float32_error" in message:
            self.float32_errors[message["float32_error"]] = worst_from_json(message["worst"])
        elif "float32_error_unavailable" in message:
            self._print(f"no float64 reference: {message['float32_error_unavailable']}")
        else:
            self.rank_failures.append(message["rank_failure"])
            self._print(f"ranks failed after the last cell: {message['rank_failure']}")

    def add(self, outcome: Outcome) -> None:
        """Store and print an outcome, and update the JSON report."""
        self.outcomes.append(outcome)
        self._print(report.row(outcome, self.width), *report.mismatch_lines(outcome))
        self._write(complete=False)

    def finish(self) -> None:
        """Print the summary and write the final JSON report."""
        self._write(complete=True)
        self._print(*report.summary(self.outcomes, self.float32_errors, self.width))

    @property
    def is_ok(self) -> bool:
        """Whether at least one cell was compared and nothing failed."""
        compared = any(outcome.status == "ok" for outcome in self.outcomes)
        failed = any(outcome.is_failure for outcome in self.outcomes)
        return compared and not failed and not self.rank_failures

    def _print(self, *lines: str) -> None:
        if self.is_rank_zero:
            for line in lines:
                print(line, flush=True)

    def _write(self, *, complete: bool) -> None:
        if self.out is not None and self.is_rank_zero:
            values = report.as_json(
                self.outcomes, self.float32_errors, self.metadata, complete=complete
            )
            storage.write_bytes(str(self.out), json.dumps(values, indent=2).encode() + b"\n")
