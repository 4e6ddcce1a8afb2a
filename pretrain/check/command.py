"""`vlmoe check-parallel`: worlds, cells and ranks put together."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.config import dump_yaml, join_problems
from data_pipeline.common.errors import ConfigError
from data_pipeline.common.logs import Progress
from pretrain.check import report
from pretrain.check.cells import check_run, pairs_for, parse_cells, why_not
from pretrain.check.compare import Worst
from pretrain.check.job import Case, Job, Outcome, read_worst
from pretrain.check.launch import run_on_this_machine
from pretrain.check.small import shrink
from pretrain.config.presets import load_run
from pretrain.config.schema import RunConfig
from pretrain.parallel.environment import refuse_tasks_without_ranks

logger = logging.getLogger(__name__)

Say = Callable[[str], None]


@dataclass(kw_only=True)
class Found:
    """All that was found so far; written down after every cell."""

    about: dict[str, Any]
    out: Path | None
    say: Say
    width: int
    outcomes: list[Outcome] = field(default_factory=list)
    floors: dict[str, Worst] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)
    progress: Progress | None = None
    """Of the cells of a world; only where something is shown."""

    def add(self, outcome: Outcome) -> None:
        """Show one outcome and keep it."""
        self.outcomes.append(outcome)
        for line in (report.row(outcome, self.width), *report.details(outcome)):
            self.say(line)
        self.write(complete=False)

    def begin(self, world_size: int, cells: int) -> None:
        """The cells of a world are about to run; starting ranks takes a while, so something is said
        before."""
        if self.say is _print:
            logger.info(
                "%d cells of %d ranks to compare; the ranks are starting", cells, world_size
            )
            self.progress = Progress(f"{world_size} ranks", cells, "cells")

    def hear(self, answer: dict[str, Any]) -> None:
        """What ranks tell."""
        if "outcome" in answer:
            self.add(Outcome.from_json(answer["outcome"]))
            if self.progress is not None:
                self.progress.update()
        elif "floor" in answer:
            self.floors[answer["floor"]] = read_worst(answer["worst"])
        elif "no_floor" in answer:
            self.say(f"no reference in float64: {answer['no_floor']}")
        else:
            self.troubles.append(answer["trouble"])
            self.say(f"the ranks did not end well: {answer['trouble']}")

    def write(self, *, complete: bool) -> None:
        """The JSON, if it is wanted."""
        if self.out is not None:
            facts = report.as_json(self.outcomes, self.floors, self.about, complete=complete)
            storage.write_bytes(str(self.out), json.dumps(facts, indent=2).encode() + b"\n")

    @property
    def is_good(self) -> bool:
        """Every cell that could run agrees, and there is one."""
        compared = any(outcome.status == "ok" for outcome in self.outcomes)
        return (
            compared and not self.troubles and not any(outcome.is_bad for outcome in self.outcomes)
        )


def check_parallel(
    run_file: str,
    overrides: Sequence[str],
    *,
    worlds: Sequence[int],
    cells: Sequence[str],
    small: bool = False,
    pairs: int | None = None,
    seconds: float = 300.0,
    out: Path | None = None,
) -> bool:
    """Check a run and print what is found; whether every cell agrees with one process.

    Args:
        run_file: A run file, or the name of a preset.
        overrides: Settings that win over it.
        worlds: Numbers of ranks to start here, one after the other; of no effect on ranks that
            torchrun started.
        cells: See `pretrain.check.cells`.
        small: Scale the model down.
        pairs: Of the global batch; by default as few as the cells can split.
        seconds: Longest time for one cell.
        out: Where to write JSON.

    Raises:
        VlmError: The run cannot be checked at all.
    """
    refuse_tasks_without_ranks()
    run = load_run(run_file, overrides)
    run = shrink(run) if small else run
    started = "RANK" in os.environ
    worlds = [int(os.environ.get("WORLD_SIZE", "1"))] if started else worlds
    for world_size in worlds:
        parse_cells(
            cells, run, world_size
        )  # all that is wrong with the question is said before a table begins
    speaks = os.environ.get("RANK", "0") == "0"
    about = {"run": run_file, "settings": list(overrides), "small": small}
    found = Found(
        about=about,
        out=out if speaks else None,
        say=_print if speaks else _say_nothing,
        width=shutil.get_terminal_size((report.WHOLE_WIDTH, 40)).columns,
    )
    for line in report.head(found.width):
        found.say(line)
    with tempfile.TemporaryDirectory(prefix="vlmoe-check-") as folder:
        for world_size in worlds:
            place = Path(folder) / str(world_size)
            place.mkdir()
            job = _job(run, world_size, cells, pairs, seconds, place, found)
            if job.cases:
                found.begin(world_size, len(job.cases))
                (_in_these_ranks if started else run_on_this_machine)(job, world_size, found.hear)
    found.write(complete=True)
    for line in report.foot(found.outcomes, found.floors, found.width):
        found.say(line)
    if all(outcome.status == "unsupported" for outcome in found.outcomes):
        raise ConfigError(
            "no cell that was asked for can run, for the reasons above; choose others with --cells"
        )
    return found.is_good


def _job(
    run: RunConfig,
    world_size: int,
    texts: Sequence[str],
    pairs: int | None,
    seconds: float,
    folder: Path,
    found: Found,
) -> Job:
    """The cells that can run in a world; the others are told at once."""
    wanted = parse_cells(texts, run, world_size)
    whole = pairs or pairs_for(wanted, run, world_size)
    wrong = check_run(run, world_size, whole)
    if wrong:
        raise ConfigError(join_problems(wrong, "this run cannot be checked in any cell"))
    cases = []
    for cell in wanted:
        reason = why_not(run, cell, world_size, whole)
        if reason:
            found.add(
                Outcome(
                    run=run.name,
                    world_size=world_size,
                    cell=cell,
                    status="unsupported",
                    reason=reason,
                )
            )
        else:
            cases.append(Case("run", cell))
    path = folder / "run.yaml"
    path.write_text(dump_yaml(run), encoding="utf-8")
    return Job(
        runs={"run": str(path)},
        cases=tuple(cases),
        pairs=whole,
        folder=str(folder),
        seconds=seconds,
    )


def _in_these_ranks(job: Job, world_size: int, tell: Callable[[dict[str, Any]], None]) -> None:
    """The job in the ranks that torchrun started. Collective."""
    from pretrain.check.worker import work
    from pretrain.parallel.environment import rank_environment

    work(job, rank_environment(), tell)


def _print(line: str) -> None:
    print(line, flush=True)


def _say_nothing(line: str) -> None:
    """Other ranks than the first."""
