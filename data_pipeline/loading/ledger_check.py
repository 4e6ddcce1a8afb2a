"""Compares a ledger with the order of training: every step must contain exactly the samples of its
positions.

For each step, the records of all participating ranks are combined. Micro-batch m of rank r has the
positions given by `micro_batch_positions`, and must record the samples at those positions: first
the samples that it contains, in order, then those that were filtered out or corrupt. A step must
begin at the position where the previous step ended, and belongs to one phase of the data.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.common.errors import DataError
from data_pipeline.common.tables import counted
from data_pipeline.loading.ledger import CORRUPT, FILTERED, Record, rank_files, read_records
from data_pipeline.order.micro_batches import micro_batch_positions
from data_pipeline.order.order import Order
from data_pipeline.order.state import Ranges, delivered_positions

_MAX_PROBLEMS = 20


class PhaseOrder(NamedTuple):
    """The order of one phase, computed again from the same data."""

    number: int
    order: Order
    shard_starts: np.ndarray
    """int64, index of the first sample of each shard over all sources of the phase."""


@dataclass
class PhaseCount:
    """What was recorded of one phase."""

    number: int
    begin: int
    """Position of its first sample."""
    samples: int = 0


@dataclass
class LedgerReport:
    """Result of the comparison."""

    first_step: int = 1
    """First recorded step: the ledger may have been enabled during the run."""
    steps: int = 0
    """Recorded steps, over all restarts."""
    begin: int = 0
    """Position before the first recorded step."""
    end: int = 0
    """Position after the last recorded step."""
    samples: int = 0
    """Recorded samples."""
    corrupt: int = 0
    filtered: int = 0
    lost: int = 0
    """Samples of the order that no rank recorded in their step."""
    unexpected: int = 0
    """Recorded samples that are not in their step's part of the order, e.g. duplicates."""
    misplaced: int = 0
    """Steps with the right samples in the wrong order, rank or micro-batch."""
    phases: list[PhaseCount] = field(default_factory=list)
    """Phases whose data is known, in order."""
    world_sizes: list[int] = field(default_factory=list)
    """World size, and each one that it changed to."""
    problems: list[str] = field(default_factory=list)
    """Descriptions of the first problems."""

    @property
    def is_complete(self) -> bool:
        """Whether the ledger matches the order."""
        return not (self.lost or self.unexpected or self.misplaced or self.problems)

    def add_problem(self, problem: str) -> None:
        """Add a problem, up to a maximum number."""
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(problem)


def check_ledger(folder: Path, phases: Sequence[PhaseOrder], skip: Ranges = ()) -> LedgerReport:
    """Compare every step of a ledger with the order.

    Args:
        folder: The ledger.
        phases: The phases, in order.
        skip: Positions that the run skips (`LoaderState.skip`); they are never recorded.

    Raises:
        DataError: There are no rank files, or one is corrupt.
    """
    files = rank_files(folder)
    if not files:
        raise DataError(
            f"there is no ledger in {folder}: train with data.ledger=true to record one"
        )

    checker = _Checker(phases, skip)
    for step, records in _steps(files):
        checker.check_step(step, records)

    if not checker.report.steps:
        checker.report.add_problem("the ledger contains no step")
    return checker.report


def _steps(files: dict[int, Path]) -> Iterator[tuple[int, dict[int, Record]]]:
    """The records of each step by rank, in order of steps; every file is read once, in parallel."""
    readers = {rank: read_records(path) for rank, path in files.items()}
    current = {rank: next(reader, None) for rank, reader in readers.items()}
    while steps := [record.step for record in current.values() if record is not None]:
        step = min(steps)
        records = {
            rank: record
            for rank, record in current.items()
            if record is not None and record.step == step
        }
        for rank, record in records.items():
            following = next(readers[rank], None)
            current[rank] = following
            if following is not None and following.step <= record.step:
                raise DataError(
                    f"{files[rank]}: step {following.step} comes after step {record.step}"
                )
        yield step, records


class _Checker:
    """Compares steps with the order and fills a report."""

    def __init__(self, phases: Sequence[PhaseOrder], skip: Ranges) -> None:
        self._phases, self._skip = phases, skip
        counts = [PhaseCount(phase.number, phase.order.begin) for phase in phases]
        self.report = LedgerReport(phases=counts)

    def check_step(self, step: int, records: dict[int, Record]) -> None:
        """Compare one step with the order.

        Args:
            step: The step.
            records: Its record by rank.
        """
        report, first = self.report, next(iter(records.values()))
        self._check_positions(step, first)
        self._check_ranks(step, records)
        report.steps, report.end = step - report.first_step + 1, first.after
        if not report.world_sizes or report.world_sizes[-1] != first.world_size:
            report.world_sizes.append(first.world_size)

        flagged = np.concatenate([record.samples for record in records.values()])
        report.samples += len(flagged)
        report.corrupt += int(np.count_nonzero(flagged & CORRUPT))
        report.filtered += int(np.count_nonzero(flagged & FILTERED))
        phase = self._phase_of(step, first)
        report.phases[phase].samples += len(flagged)
        expected = self._expected(self._phases[phase], first.before, first.after)
        self._check_samples(step, records, expected)

    def _check_positions(self, step: int, record: Record) -> None:
        """Check that the step follows the previous one."""
        report, before = self.report, record.before
        if not report.world_sizes:
            report.first_step, report.begin, report.end = step, before, before

        expected_step = report.first_step + report.steps
        if step != expected_step:
            report.add_problem(f"step {expected_step} is missing; the next one is step {step}")
        if before != report.end:
            report.add_problem(
                f"step {step} begins at position {before}, but the previous step ended at position "
                f"{report.end}"
            )
            if before > report.end:
                report.lost += before - report.end - self._num_skipped(report.end, before)

    def _check_ranks(self, step: int, records: dict[int, Record]) -> None:
        """Check that all ranks took part and agree."""
        report, first = self.report, next(iter(records.values()))
        # Fields 1 to 4: positions, world size, micro-batch size.
        if any(record[1:5] != first[1:5] for record in records.values()):
            report.add_problem(
                f"step {step}: the ranks do not agree on positions, world size or micro-batch size"
            )

        ranks = set(range(first.world_size))
        if missing := sorted(ranks - set(records)):
            report.add_problem(
                f"step {step}: no record of rank(s) {_first_few(missing)} of {first.world_size}"
            )
        if unknown := sorted(set(records) - ranks):
            report.add_problem(
                f"step {step}: there are records of rank(s) {_first_few(unknown)}, but the world "
                f"size was {first.world_size}"
            )

    def _check_samples(self, step: int, records: dict[int, Record], expected: np.ndarray) -> None:
        """Compare the samples of all ranks with the expected ones."""
        report = self.report
        recorded = np.concatenate([record.ids for record in records.values()])
        if not np.array_equal(np.sort(expected), np.sort(recorded)):
            expected_counts = Counter(expected.tolist())
            recorded_counts = Counter(recorded.tolist())
            lost = expected_counts - recorded_counts
            unexpected = recorded_counts - expected_counts
            report.lost += lost.total()
            report.unexpected += unexpected.total()
            report.add_problem(
                f"step {step}: {counted(lost.total(), 'sample')} lost "
                f"({_first_few(sorted(lost))}), {unexpected.total()} unexpected "
                f"({_first_few(sorted(unexpected))})"
            )
        elif not all(_is_in_order(record, rank, expected) for rank, record in records.items()):
            report.misplaced += 1
            report.add_problem(f"step {step}: all samples are present, but in the wrong order")

    def _phase_of(self, step: int, record: Record) -> int:
        """Index of the phase of a step, which must be a single one."""
        begins = [phase.order.begin for phase in self._phases]
        index = bisect.bisect_right(begins, record.before) - 1
        if index < 0:
            raise DataError(
                f"step {step} begins at position {record.before}, before the first phase whose "
                f"data is known, which begins at position {begins[0]}"
            )
        if index + 1 < len(begins) and record.after > begins[index + 1]:
            self.report.add_problem(
                f"step {step} has positions {record.before} to {record.after}, but the next phase "
                f"begins at position {begins[index + 1]}"
            )
        return index

    def _expected(self, phase: PhaseOrder, before: int, after: int) -> np.ndarray:
        """Indices of the samples between two positions of the order."""
        count = after - before - self._num_skipped(before, after)
        refs = []
        for positions in delivered_positions(before, self._skip, 0, count):
            refs += phase.order.samples(positions.start, len(positions))

        ids: np.ndarray = phase.shard_starts[[ref.shard for ref in refs]]
        return ids + np.array([ref.sample for ref in refs], dtype=np.int64)

    def _num_skipped(self, before: int, after: int) -> int:
        """How many positions from `before` to `after - 1` are skipped."""
        return sum(max(0, min(end, after) - max(first, before)) for first, end in self._skip)


def _is_in_order(record: Record, rank: int, expected: np.ndarray) -> bool:
    """Whether each micro-batch of a rank contains the samples of its positions, in order."""
    size, ids, is_used = record.micro_batch_size, record.ids, record.samples < FILTERED
    if len(ids) * record.world_size != len(expected) or len(ids) % max(1, size):
        return False

    for micro in range(len(ids) // size):
        positions = micro_batch_positions(
            0, micro, rank, micro_batch_size=size, world_size=record.world_size
        )
        batch = slice(micro * size, (micro + 1) * size)
        used = ids[batch][is_used[batch]].tolist()

        # Filtered and corrupt samples are at the end of their micro-batch. Without them, the
        # order must be the same.
        left_out = Counter(ids[batch][~is_used[batch]].tolist())
        remaining = []
        for sample in expected[positions.start : positions.stop].tolist():
            if left_out[sample]:
                left_out[sample] -= 1
            else:
                remaining.append(sample)
        if remaining != used:
            return False
    return True


def _first_few(values: Sequence[int]) -> str:
    if not values:
        return "none"
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
