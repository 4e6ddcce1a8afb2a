"""Compares a ledger with the order of training: every step must hold exactly the samples of its
positions.

For each step the records of all ranks that took part are put together. Rank r's micro-batch m has
the positions that `micro_batch_positions` gives it, and must hold the samples of those positions,
delivered ones in their order. A step must begin where the one before ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.common.errors import DataError
from data_pipeline.loading.ledger import BAD, FILTERED, Record, rank_files, read_records
from data_pipeline.order.order import Order
from data_pipeline.order.plan import micro_batch_positions
from data_pipeline.order.state import Ranges, delivered

_MOST_PROBLEMS = 20


@dataclass
class LedgerReport:
    """What a ledger proves."""

    first_step: int = 1
    """The first that is recorded: the ledger may have been switched on later."""
    steps: int = 0
    """Recorded, over all restarts."""
    begin: int = 0
    """Position before the first of them."""
    end: int = 0
    """Position after the last of them."""
    samples: int = 0
    """Recorded, over all steps."""
    bad: int = 0
    filtered: int = 0
    lost: int = 0
    """Samples of the order that no rank recorded in their step."""
    surplus: int = 0
    """Samples recorded that the order does not have in that step: duplicates and strangers."""
    misplaced: int = 0
    """Micro-batches with the right samples in the wrong order, or of another rank or
    micro-batch."""
    worlds: list[int] = field(default_factory=list)
    """Numbers of ranks, one after the other as they changed."""
    problems: list[str] = field(default_factory=list)
    """What is wrong, in words; the first of many."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.lost or self.surplus or self.misplaced or self.problems)

    def say(self, problem: str) -> None:
        """Note what is wrong, unless there is much already."""
        if len(self.problems) < _MOST_PROBLEMS:
            self.problems.append(problem)


def check_ledger(
    folder: Path, order: Order, shard_starts: np.ndarray, skip: Ranges = ()
) -> LedgerReport:
    """Compare every step of a ledger with the order.

    Args:
        folder: The ledger.
        order: Made again from the same data.
        shard_starts: int64, number of the first sample of each shard over all sources.
        skip: Positions that were not delivered.

    Raises:
        DataError: There are no files of ranks, or one is damaged.
    """
    files = rank_files(folder)
    if not files:
        raise DataError(f"there is no ledger in {folder}: train with data.ledger=true to keep one")
    report = LedgerReport()
    for step, records in _steps(files):
        _check_step(report, step, records, order, shard_starts, skip)
    if not report.steps:
        report.say("the ledger holds no step")
    return report


def _steps(files: dict[int, Path]) -> Iterator[tuple[int, dict[int, Record]]]:
    """The records of each step by rank, steps rising; every file is read once, side by side."""
    readers = {rank: read_records(path) for rank, path in files.items()}
    heads = {rank: next(reader, None) for rank, reader in readers.items()}
    while waiting := [record.step for record in heads.values() if record is not None]:
        step = min(waiting)
        found = {
            rank: record
            for rank, record in heads.items()
            if record is not None and record.step == step
        }
        for rank, record in found.items():
            heads[rank] = next(readers[rank], None)
            following = heads[rank]
            if following is not None and following.step <= record.step:
                raise DataError(
                    f"{files[rank]}: step {following.step} comes after step {record.step}"
                )
        yield step, found


def _check_step(
    report: LedgerReport,
    step: int,
    records: dict[int, Record],
    order: Order,
    shard_starts: np.ndarray,
    skip: Ranges,
) -> None:
    first = next(iter(records.values()))
    world_size, pairs, before, after = (
        first.world_size,
        first.micro_batch_size,
        first.before,
        first.after,
    )
    if not report.worlds:
        report.first_step, report.begin, report.end = step, before, before
    if step != report.first_step + report.steps:
        report.say(f"step {report.first_step + report.steps} is missing; step {step} comes next")
    if before != report.end:
        report.say(
            f"step {step} begins at position {before}, but the one before ended at {report.end}"
        )
        if before > report.end:
            report.lost += before - report.end - _skipped(skip, report.end, before)
    if any(
        (r.before, r.after, r.world_size, r.micro_batch_size) != (before, after, world_size, pairs)
        for r in records.values()
    ):
        report.say(f"step {step}: its ranks do not agree on its positions or their number")
    if missing := sorted(set(range(world_size)) - set(records)):
        report.say(f"step {step}: nothing from rank(s) {_some(missing)} of {world_size}")
    if strangers := sorted(set(records) - set(range(world_size))):
        report.say(
            f"step {step}: rank(s) {_some(strangers)} took part, but there were only {world_size}"
        )
    report.steps, report.end = step - report.first_step + 1, after
    if not report.worlds or report.worlds[-1] != world_size:
        report.worlds.append(world_size)

    expected = _expected(order, shard_starts, before, after, skip)
    found = np.concatenate([record.ids for record in records.values()])
    report.samples += len(found)
    marks = np.concatenate([record.samples for record in records.values()])
    report.bad += int(np.count_nonzero(marks & BAD))
    report.filtered += int(np.count_nonzero(marks & FILTERED))
    if not np.array_equal(np.sort(expected), np.sort(found)):
        wanted, got = Counter(expected.tolist()), Counter(found.tolist())
        lost, surplus = wanted - got, got - wanted
        report.lost += lost.total()
        report.surplus += surplus.total()
        report.say(
            f"step {step}: {lost.total()} samples lost ({_some(sorted(lost))}), {surplus.total()} too many "
            f"({_some(sorted(surplus))})"
        )
    elif not all(_in_place(record, rank, expected) for rank, record in records.items()):
        report.misplaced += 1
        report.say(f"step {step}: all samples are there, but not where the order has them")


def _expected(
    order: Order, shard_starts: np.ndarray, before: int, after: int, skip: Ranges
) -> np.ndarray:
    """Numbers of the samples that the order has between two positions."""
    refs = [
        ref
        for part in delivered(before, skip, 0, after - before - _skipped(skip, before, after))
        for ref in order.samples(part.start, len(part))
    ]
    numbers: np.ndarray = shard_starts[[ref.shard for ref in refs]]
    return numbers + np.array([ref.sample for ref in refs], dtype=np.int64)


def _skipped(skip: Ranges, before: int, after: int) -> int:
    """How many positions from `before` to `after - 1` are not delivered."""
    return sum(max(0, min(end, after) - max(first, before)) for first, end in skip)


def _in_place(record: Record, rank: int, expected: np.ndarray) -> bool:
    """Whether each micro-batch of a rank holds the samples of its own places in the step."""
    pairs, ids, good = record.micro_batch_size, record.ids, record.samples < FILTERED
    if len(ids) * record.world_size != len(expected) or len(ids) % max(1, pairs):
        return False
    for micro in range(len(ids) // pairs):
        places = micro_batch_positions(
            0, micro, rank, micro_batch_size=pairs, world_size=record.world_size
        )
        wanted = expected[places.start : places.stop]
        mine = slice(micro * pairs, (micro + 1) * pairs)
        delivered_ids = ids[mine][good[mine]]
        # Those left out stand at the end of their micro-batch; without them the order must be the
        # same.
        left_out = Counter(ids[mine][~good[mine]].tolist())
        rest = []
        for number in wanted.tolist():
            if left_out[number]:
                left_out[number] -= 1
            else:
                rest.append(number)
        if rest != delivered_ids.tolist():
            return False
    return True


def _some(numbers: Sequence[int]) -> str:
    return (
        ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        if numbers
        else "none"
    )
