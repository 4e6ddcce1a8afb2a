"""What every rank does: train each cell, compare with the reference, tell rank 0.

One set of ranks goes through all cells of a world, because starting DeepSpeed takes longer than
training a small model. The reference is trained by one rank of each node, kept in a file, and read
by all of them.

    python -m pretrain.check.worker JOB.json      with the variables that torchrun sets
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pretrain.check.cells import Cell, cell_run, missing_rows, stage_of
from pretrain.check.compare import (
    Comparison,
    all_choices,
    facts,
    float64_floor,
    judge,
    merge,
    merge_each,
    missing_names,
)
from pretrain.check.job import (
    AFTER_THE_CASES,
    Answers,
    Case,
    Job,
    Outcome,
    plain_number,
    plain_worst,
)
from pretrain.check.tracing import Trace, Write, reference, trace
from pretrain.config.batch import plan_batch
from pretrain.config.presets import load_run
from pretrain.config.schema import RunConfig
from pretrain.parallel.environment import (
    RankEnvironment,
    keep_freed_memory,
    rank_environment,
    start_process_group,
    stop_process_group,
)
from pretrain.parallel.masters import release
from pretrain.train.build import build_engine

START_SECONDS = 120.0
"""Importing DeepSpeed on every rank, and meeting."""
DRAWS = 3
"""So many weights and batches are tried in a float32 cell until no choice falls to another
expert."""
LATE, FAILED = 3, 4
"""Exit statuses of a rank whose cell took too long, or failed."""


class Ranks:
    """This rank's part of a job."""

    def __init__(self, job: Job, environment: RankEnvironment) -> None:
        self.job, self.environment = job, environment
        self.runs = {name: load_run(path) for name, path in job.runs.items()}
        self._references: dict[str, Trace] = {}
        # Ranks that torchrun started have a folder each; a node's ranks share that of its first
        # one.
        self._folder = Path(
            self.all_gather_json(job.folder)[environment.rank - environment.local_rank]
        )

    def outcomes(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and answer of every case, in order; the same on every rank."""
        for number, case in list(enumerate(self.job.cases))[self.job.first :]:
            yield number, self._compare(number, case)

    def floors(self) -> Iterator[dict[str, Any]]:
        """How far the float32 reference of each run is from float64; on rank 0 alone, others give
        nothing."""
        for name, run in self.runs.items() if self.environment.rank == 0 else ():
            with self._deadline(AFTER_THE_CASES, f"the reference of {name} in float64"):
                try:
                    yield {"floor": name, "worst": self._floor(run)}
                except (
                    RuntimeError,
                    MemoryError,
                ) as error:  # does not fit, or an operation knows no float64
                    _forget()
                    yield {"no_floor": f"{name}: {str(error).splitlines()[0]}"}

    def _compare(self, number: int, case: Case) -> dict[str, Any]:
        """The answer of a case; on other weights and pairs again while near ties make it a rough
        comparison."""
        began = time.perf_counter()
        for draw in range(DRAWS):
            outcome = self._compare_drawn(number, case, draw)
            assert outcome.verdict is not None
            # Alike on all ranks, since each has merged the differences of all.
            if not (case.cell.precision == "fp32" and outcome.verdict.is_rough):
                break
        return replace(outcome, seconds=time.perf_counter() - began).to_json()

    def _compare_drawn(self, number: int, case: Case, draw: int) -> Outcome:
        world_size = self.environment.world_size
        label = case.cell.label(world_size)
        of_run = replace(self.runs[case.run], seed=self.runs[case.run].seed + draw)
        run = cell_run(of_run, case.cell, world_size, self.job.pairs)
        with self._deadline(number, f"the reference for {label}"):
            truth = self._reference(case, run)
        with self._deadline(number, label):
            found = Comparison(truth)
            trace_cell(
                run,
                self.environment,
                missing_rows(case.cell, world_size, self.job.pairs),
                found.add,
            )
            everyone = self.all_gather_json(
                [plain_worst(found.worst), found.seen, _plain_each(found.each)]
            )
        seen = {name for _, names, _ in everyone for name in names}
        worst = merge([*(of_rank for of_rank, _, _ in everyone), missing_names(seen, truth)])
        verdict = judge(
            worst, case.cell.precision, all_choices(truth), other_rounding=_rounds_elsewhere(run)
        )
        return Outcome(
            run=case.run,
            world_size=world_size,
            cell=case.cell,
            worst=worst,
            verdict=verdict,
            status="miss" if verdict.misses else "ok",
            facts=facts(truth, run.optim.clip_norm),
            each={q: merge_each(of_rank[q] for _, _, of_rank in everyone) for q in found.each},
        )

    def _reference(self, case: Case, run: RunConfig) -> Trace:
        """The reference of a case: trained by the node's first rank unless its file is there
        already."""
        missing = missing_rows(case.cell, self.environment.world_size, self.job.pairs)
        rounded = case.cell.precision == "bf16" and stage_of(case.cell) > 0
        # With the rows of a rank missing, the number of micro-batches decides which ones those are.
        rows = f"rank{case.cell.accumulation}" if case.cell.missing == "rank" else case.cell.missing
        name = f"{case.run}-{run.seed}-{case.cell.terms}-{case.cell.precision}{'-rounded' if rounded else ''}-{rows}"
        if name not in self._references:
            path = self._folder / f"{name}.safetensors"
            if self.environment.local_rank == 0 and not path.exists():
                of_run = replace(self.runs[case.run], seed=run.seed)
                alone = Cell(
                    precision=case.cell.precision,
                    recompute=of_run.model.activation_checkpointing,
                    terms=case.cell.terms,
                )
                whole = cell_run(of_run, alone, 1, self.job.pairs)
                found = reference(whole, missing, self.environment.device, rounded=rounded)
                half = path.with_suffix(".part")
                save_file({key: tensor.contiguous() for key, tensor in found.items()}, half)
                half.rename(path)
                _forget()
            self.all_gather_json(None)
            self._references[name] = load_file(
                path
            )  # mapped: all ranks of a node share these pages
        return self._references[name]

    def _floor(self, run: RunConfig) -> dict[str, list[Any]]:
        whole = cell_run(run, Cell(recompute=run.model.activation_checkpointing), 1, self.job.pairs)
        single = reference(whole, (), self.environment.device)
        exact = reference(whole, (), self.environment.device, float64=True)
        return plain_worst(dict(float64_floor(single, exact)))

    def all_gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order. Collective."""
        # Imported late: DeepSpeed takes seconds to import and wants the accelerator chosen first.
        from pretrain.parallel.deepspeed_engine import gather_json

        return gather_json(value, self.environment.device)

    @contextmanager
    def _deadline(self, number: int, what: str) -> Iterator[None]:
        """End this process with its last words when the block takes too long or fails: others wait
        for it."""
        timer = threading.Timer(self.job.seconds, self._give_up, (number, what))
        timer.daemon = True
        timer.start()
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - whatever it is, the other ranks wait for this one
            reason = f"{type(error).__name__}: {error}"
            self._last_words(number, "error", f"rank {self.environment.rank}, {what}: {reason}")
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(FAILED)  # the group's threads may hang too
        finally:
            timer.cancel()

    def _give_up(self, number: int, what: str) -> None:
        place = _innermost(sys._current_frames()[threading.main_thread().ident or 0])
        self._last_words(
            number,
            "hang",
            f"rank {self.environment.rank}, {what}: no end after "
            f"{self.job.seconds:g} s; it stood in {place}",
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(LATE)

    def _last_words(self, number: int, status: str, reason: str) -> None:
        reason = reason if len(reason) < 2000 else reason[:2000] + " ..."
        print(f"error: {reason}", file=sys.stderr, flush=True)
        folder = Path(self.job.folder) / f"rank-{self.environment.rank:05d}"
        folder.mkdir(exist_ok=True)
        Answers(folder).add({"case": number, "status": status, "reason": reason})


def _rounds_elsewhere(run: RunConfig) -> bool:
    """Whether a cell's layers round at other places than the reference's, which counts in bfloat16.

    DeepSpeed's layer does, and so does our loop over the experts where rows travel: at home it adds
    in float32.
    """
    return run.moe.backend == "deepspeed" or (
        run.moe.backend == "loop" and run.parallel.expert_parallel_size > 1
    )


def trace_cell(
    run: RunConfig, environment: RankEnvironment, missing: Collection[int], write: Write
) -> None:
    """This rank's trace of a cell. Collective."""
    plan = plan_batch(
        run.batch.global_batch_size, run.batch.micro_batch_size, environment.world_size
    )
    engine = build_engine(run, environment, plan)
    try:
        trace(engine, run, missing, write)
    finally:
        release(engine)
        del engine
        _forget()


def work(job: Job, environment: RankEnvironment, tell: Callable[[dict[str, Any]], None]) -> None:
    """Do a job; `tell` gets every answer. Collective.

    Answers are `{"case": number, "outcome": {...}}`, on every rank, and on rank 0 `{"floor": run,
    "worst": {...}}` or `{"no_floor": reason}`.
    """
    if environment.device.type == "cpu":
        keep_freed_memory()
    # Longer than a cell may take: who is late is told by the rank's own clock, and not by its
    # peers.
    start_process_group(environment, max(START_SECONDS, 2 * job.seconds + 60))
    ranks = Ranks(job, environment)
    for number, outcome in ranks.outcomes():
        tell({"case": number, "outcome": outcome})
    for floor in ranks.floors() if job.float64 else ():
        tell(floor)
    ranks.all_gather_json(None)
    stop_process_group()  # or its threads may still run when the process ends, which C++ calls a crash


def main() -> None:
    """One rank of `launch`."""
    parser = argparse.ArgumentParser(description="one rank of vlmoe check-parallel")
    parser.add_argument("job", type=Path)
    job = Job.from_json(parser.parse_args().job.read_text(encoding="utf-8"))
    environment = rank_environment()
    work(job, environment, Answers(job.folder).add if environment.rank == 0 else _ignore_answer)


def _ignore_answer(answer: dict[str, Any]) -> None:
    """Other ranks than the first."""


def _plain_each(each: dict[str, dict[str, float]]) -> dict[str, dict[str, float | str]]:
    """As JSON has it."""
    return {
        quantity: {name: plain_number(value) for name, value in found.items()}
        for quantity, found in each.items()
    }


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _innermost(frame: Any) -> str:
    """Where a thread stands in our own code, or at all."""
    frames = traceback.extract_stack(frame)
    own = [
        entry
        for entry in frames
        if "/pretrain/" in entry.filename and "/check/" not in entry.filename
    ]
    entry = (own or frames)[-1]
    return f"{entry.name} ({Path(entry.filename).name}:{entry.lineno})"


if __name__ == "__main__":
    main()
