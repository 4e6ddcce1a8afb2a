"""The program of each rank: trains each case, compares it with the reference, reports to rank 0.

One set of processes runs all cases of a world size, because importing DeepSpeed takes longer than
training a small model. The reference is trained by one rank of each node, stored in a file, and
read by all ranks of the node.

    python -m pretrain.parity.worker JOB.json      with the environment variables of torchrun
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.config.batch import plan_batch
from pretrain.config.presets import load_run
from pretrain.config.schema import RunConfig
from pretrain.parallel.communicator import TorchCommunicator
from pretrain.parallel.environment import (
    RankEnvironment,
    rank_environment,
    retain_freed_memory,
    start_process_group,
    stop_process_group,
)
from pretrain.parity.case_runs import missing_rows, run_for_case
from pretrain.parity.cases import Case, stage_of
from pretrain.parity.compare import (
    Comparison,
    float64_errors,
    median_gradient,
    merge,
    merge_by_name,
    missing_names,
    num_assignments,
    reference_stats,
)
from pretrain.parity.deadline import Deadline
from pretrain.parity.job import (
    AFTER_ALL_CASES,
    Job,
    MessageLog,
    Result,
    by_name_to_json,
    worst_to_json,
)
from pretrain.parity.replay import RoutingReplay
from pretrain.parity.tolerances import find_mismatches
from pretrain.parity.tracing import Record, Trace, reference, split_selections, trace
from pretrain.train.build import build_engine

START_SECONDS = 120.0
"""Minimum timeout of the process group; ranks import DeepSpeed before the first collective."""
OnMessage = Callable[[dict[str, Any]], None]


class RankWorker:
    """One rank of a job."""

    def __init__(self, job: Job, environment: RankEnvironment) -> None:
        self.job, self.environment = job, environment
        self.runs = {name: load_run(path) for name, path in job.runs.items()}
        self._deadline = Deadline(environment.rank, job.folder, job.seconds)
        self._references: dict[str, Trace] = {}
        # With torchrun each rank has a temporary folder; the ranks of a node share that of the
        # node's first rank.
        folders = self.all_gather_json(job.folder)
        self._folder = Path(folders[environment.rank - environment.local_rank])

    def results(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Index and result of every case, in order; the same on every rank."""
        for index, case in list(enumerate(self.job.cases))[self.job.first :]:
            yield index, self._compare(index, case)

    def float32_errors(self) -> Iterator[dict[str, Any]]:
        """Messages with the rounding error of each run's float32 reference; only on rank 0."""
        for name, run in self.runs.items() if self.environment.rank == 0 else ():
            with self._deadline.limit(AFTER_ALL_CASES, f"the reference of {name} in float64"):
                try:
                    yield {"float32_error": name, "worst": self._float32_error(run)}
                except (RuntimeError, MemoryError) as error:
                    # Out of memory, or an operation without a float64 implementation.
                    _free_memory()
                    reason = f"{name}: {str(error).splitlines()[0]}"
                    yield {"float32_error_unavailable": reason}

    def _compare(self, index: int, case: Case) -> dict[str, Any]:
        """The result of a case."""
        start = time.perf_counter()
        world_size, pairs = self.environment.world_size, self.job.pairs
        label = case.label(world_size)
        run = run_for_case(self.runs[case.run], case, world_size, pairs)

        with self._deadline.limit(index, f"the reference for {label}"):
            expected, selections = split_selections(self._reference(case, run))
        with self._deadline.limit(index, label):
            comparison = Comparison(expected)
            missing = missing_rows(case, world_size, pairs)
            trace_case(run, self.environment, missing, comparison.add, selections)
            ranks = self.all_gather_json(
                [
                    worst_to_json(comparison.worst),
                    comparison.seen,
                    by_name_to_json(comparison.by_name),
                ]
            )

        seen = {name for _, names, _ in ranks for name in names}
        by_name = {
            quantity: merge_by_name(by_name[quantity] for _, _, by_name in ranks)
            for quantity in comparison.by_name
        }
        worst = merge(
            [
                *(values for values, _, _ in ranks),
                missing_names(seen, expected),
                median_gradient(by_name["gradient"]),
            ]
        )
        mismatches = find_mismatches(
            worst,
            case.precision,
            num_assignments(expected),
            other_rounding=_has_other_rounding(run),
        )
        result = Result(
            case=case,
            world_size=world_size,
            worst=worst,
            mismatches=mismatches,
            status="mismatch" if mismatches else "ok",
            reference_stats=reference_stats(expected, run.optim.clip_norm),
            by_name=by_name,
            seconds=time.perf_counter() - start,
        )
        return result.to_json()

    def _reference(self, case: Case, run: RunConfig) -> Trace:
        """The reference of a case, trained by the node's first rank unless its file exists."""
        name = self._reference_name(case, run)
        if name not in self._references:
            path = self._folder / f"{name}.safetensors"
            if self.environment.local_rank == 0 and not path.exists():
                self._train_reference(case, run, path)
            self.all_gather_json(None)
            # Memory-mapped: all ranks of a node share these pages.
            self._references[name] = load_file(path)
        return self._references[name]

    def _reference_name(self, case: Case, run: RunConfig) -> str:
        """File name of the reference; contains everything that determines it."""
        # The rows that `missing=rank` removes depend on the number of micro-batches.
        rows = f"rank{case.accumulation}" if case.missing == "rank" else case.missing
        rounded = "-rounded" if _is_rounded(case) else ""
        split = self._reference_accumulation(case)
        return f"{case.run}-{run.seed}-{case.terms}-{case.precision}{rounded}-{rows}-{split}"

    def _reference_accumulation(self, case: Case) -> int:
        """Micro-batches of the reference: one in float32, those of all ranks in bfloat16.

        In bfloat16 a matrix product of another size rounds differently. Compared with one forward
        pass, that alone changes gradients by 1e-2 (`tiny --small`, 64 pairs), which would hide
        gradients accumulated in bfloat16 (5e-3). The reference accumulates in float32.
        """
        if case.precision == "fp32":
            return 1
        return self.environment.world_size * case.accumulation

    def _train_reference(self, case: Case, run: RunConfig, path: Path) -> None:
        base = self.runs[case.run]
        single = Case(
            accumulation=self._reference_accumulation(case),
            precision=case.precision,
            recompute=base.model.activation_checkpointing,
            terms=case.terms,
        )
        tensors = reference(
            run_for_case(base, single, 1, self.job.pairs),
            missing_rows(case, self.environment.world_size, self.job.pairs),
            self.environment.device,
            rounded=_is_rounded(case),
        )

        temporary = path.with_suffix(".part")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.rename(path)
        _free_memory()

    def _float32_error(self, run: RunConfig) -> dict[str, list[Any]]:
        case = Case(recompute=run.model.activation_checkpointing)
        single_process = run_for_case(run, case, 1, self.job.pairs)
        float32, _ = split_selections(reference(single_process, (), self.environment.device))
        exact, _ = split_selections(
            reference(single_process, (), self.environment.device, float64=True)
        )
        return worst_to_json(dict(float64_errors(float32, exact)))

    def all_gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order. Collective."""
        return TorchCommunicator(self.environment.device).all_gather_json(value)


def _is_rounded(case: Case) -> bool:
    """Whether the forward pass uses weights rounded to bfloat16."""
    return case.precision == "bf16" and stage_of(case) > 0


def _has_other_rounding(run: RunConfig) -> bool:
    """Whether the case's MoE layers round at other points than the reference's, in bfloat16.

    The loop backend does with expert parallelism; without it, the loop accumulates in float32.
    """
    return run.moe.backend == "loop" and run.parallel.expert_parallel_size > 1


def trace_case(
    run: RunConfig,
    environment: RankEnvironment,
    missing: Collection[int],
    record: Record,
    selections: Mapping[str, Tensor],
) -> None:
    """This rank's trace of a case. Collective."""
    plan = plan_batch(
        run.batch.global_batch_size, run.batch.micro_batch_size, environment.world_size
    )
    engine = build_engine(run, environment, plan)
    try:
        trace(engine, run, missing, record, RoutingReplay(engine.model, selections))
    finally:
        engine.close()
        del engine
        _free_memory()


def run_job(job: Job, environment: RankEnvironment, on_message: OnMessage) -> None:
    """Run all cases of a job. Collective.

    Args:
        job: The cases.
        environment: This rank.
        on_message: Called on every rank with `{"case": index, "result": {...}}`, and on rank 0
            with `{"float32_error": run, "worst": {...}}` or
            `{"float32_error_unavailable": reason}`.
    """
    if environment.device.type == "cpu":
        retain_freed_memory()
    # Longer than the limit of a case, so that the slow rank reports the hang and not the ranks that
    # wait for it.
    start_process_group(environment, max(START_SECONDS, 2 * job.seconds + 60))
    worker = RankWorker(job, environment)
    for index, result in worker.results():
        on_message({"case": index, "result": result})
    for message in worker.float32_errors() if job.float64 else ():
        on_message(message)
    worker.all_gather_json(None)
    # Otherwise threads of the group may still run at exit, which crashes the process.
    stop_process_group()


def main() -> None:
    """One rank started by `pretrain.parity.launch`."""
    parser = argparse.ArgumentParser(description="one rank of vlmoe check-parallel")
    parser.add_argument("job", type=Path)
    job = Job.from_json(parser.parse_args().job.read_text(encoding="utf-8"))
    environment = rank_environment()
    is_rank_zero = environment.rank == 0
    run_job(job, environment, MessageLog(job.folder).add if is_rank_zero else _ignore_message)


def _ignore_message(message: dict[str, Any]) -> None:
    """Used on all ranks but rank 0."""


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
