"""The program of each rank: trains each case, compares it with the reference, reports to rank 0.

One set of processes runs all cases of a world size, because importing DeepSpeed takes longer than
training a small model. The reference is trained by one rank of each node, stored in a file, and
read by all ranks of the node.

    python -m pretrain.parity.worker JOB.json      with the environment variables of torchrun
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Collection, Mapping
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
    QUANTITIES,
    Comparison,
    compare_traces,
    largest,
    merge_ranks,
    num_assignments,
    reference_stats,
)
from pretrain.parity.deadline import time_limit
from pretrain.parity.job import Job, Result, append_message, case_message
from pretrain.parity.replay import RoutingReplay
from pretrain.parity.tolerances import find_mismatches
from pretrain.parity.tracing import Record, Trace, reference, trace
from pretrain.train.build import build_engine

START_SECONDS = 120.0
"""Minimum timeout of the process group; ranks import DeepSpeed before the first collective."""
OnMessage = Callable[[dict[str, Any]], None]


def run_job(job: Job, environment: RankEnvironment, on_message: OnMessage) -> None:
    """Run all cases of a job. Collective.

    Args:
        job: The cases.
        environment: This rank.
        on_message: Called on every rank with `{"case": index, "result": {...}}`, and on rank 0
            with `{"float32_error": {quantity: value}, "run": name}` or
            `{"no_float64_reference": reason}`.
    """
    if environment.device.type == "cpu":
        retain_freed_memory()
    # Longer than the limit of a case, so that the slow rank reports the hang and not the ranks that
    # wait for it.
    start_process_group(environment, max(START_SECONDS, 2 * job.seconds + 60))
    worker = RankWorker(job, environment)
    for index in range(job.first, len(job.cases)):
        on_message(case_message(index, worker.compare(index)))
    if job.float64 and environment.rank == 0:
        for name, run in worker.runs.items():
            task = f"the reference of {name} in float64"
            with time_limit(job.seconds, task, job.messages_path(0), failure="no-float64"):
                message = _float32_error(name, run, job.pairs, environment.device)
            on_message(message)
    worker.communicator.barrier()
    # Otherwise threads of the group may still run at exit, which crashes the process.
    stop_process_group()


class RankWorker:
    """One rank of a job."""

    def __init__(self, job: Job, environment: RankEnvironment) -> None:
        self.job, self.environment = job, environment
        self.runs = {name: load_run(path) for name, path in job.runs.items()}
        self.communicator = TorchCommunicator(environment.device)
        # With torchrun each rank has a temporary folder; the ranks of a node share that of the
        # node's first rank.
        folders = self.communicator.all_gather_json(job.folder)
        self._folder = Path(folders[environment.rank - environment.local_rank])

    def compare(self, index: int) -> Result:
        """The result of a case, the same on every rank. Collective."""
        start, case, world_size = time.perf_counter(), self.job.cases[index], self.world_size
        label = f"rank {self.environment.rank}, {case.label(world_size)}"
        messages = self.job.messages_path(self.environment.rank)
        run = run_for_case(self.runs[case.run], case, world_size, self.job.pairs)

        with time_limit(self.job.seconds, f"{label}, its reference", messages):
            expected, selections = self._reference(case, run)
        with time_limit(self.job.seconds, label, messages):
            comparison = Comparison(expected)
            missing = missing_rows(case, world_size, self.job.pairs)
            trace_case(run, self.environment, missing, comparison.add, selections)
            ranks = self.communicator.all_gather_json([comparison.differences, comparison.seen])

        differences = merge_ranks(ranks, expected)
        for quantity in set(QUANTITIES) - differences.keys():
            differences[quantity] = {"not recorded": math.inf}
        mismatches = find_mismatches(
            differences,
            case.precision,
            num_assignments(expected),
            other_rounding=_has_other_rounding(run),
        )
        return Result(
            case=case,
            world_size=world_size,
            status="mismatch" if mismatches else "ok",
            seconds=time.perf_counter() - start,
            differences=differences,
            mismatches=mismatches,
            reference_stats=reference_stats(expected, run.optim.clip_norm),
        )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.environment.world_size

    def _reference(self, case: Case, run: RunConfig) -> tuple[Trace, Trace]:
        """Trace and selections, trained by the node's first rank unless their files exist."""
        # Everything that determines the reference. The rows that `missing=rank` removes depend on
        # the number of micro-batches.
        rows = f"rank{case.accumulation}" if case.missing == "rank" else case.missing
        rounded = "-rounded" if _is_rounded(case) else ""
        split = self._reference_accumulation(case)
        name = f"{case.run}-{run.seed}-{case.terms}-{case.precision}{rounded}-{rows}-{split}"

        trace_path = self._folder / f"{name}.safetensors"
        selections_path = self._folder / f"{name}.selections.safetensors"
        if self.environment.local_rank == 0 and not trace_path.exists():
            tensors, selections = self._train_reference(case)
            _save(selections, selections_path)
            _save(tensors, trace_path)  # last: its existence means that both are complete
            _free_memory()
        self.communicator.barrier()
        # Memory-mapped: all ranks of a node share these pages.
        return load_file(trace_path), load_file(selections_path)

    def _reference_accumulation(self, case: Case) -> int:
        """Micro-batches of the reference: one in float32, those of all ranks in bfloat16.

        In bfloat16 a matrix product of another size rounds differently. Compared with one forward
        pass, that alone changes gradients by 1e-2 (`tiny --small`, 64 pairs), which would hide
        gradients accumulated in bfloat16 (5e-3). The reference accumulates in float32.
        """
        return 1 if case.precision == "fp32" else self.world_size * case.accumulation

    def _train_reference(self, case: Case) -> tuple[Trace, Trace]:
        base = self.runs[case.run]
        single = Case(
            accumulation=self._reference_accumulation(case),
            precision=case.precision,
            recompute=base.model.activation_checkpointing,
            terms=case.terms,
        )
        return reference(
            run_for_case(base, single, 1, self.job.pairs),
            missing_rows(case, self.world_size, self.job.pairs),
            self.environment.device,
            rounded=_is_rounded(case),
        )


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


def _float32_error(name: str, run: RunConfig, pairs: int, device: torch.device) -> dict[str, Any]:
    """The message with the rounding error of a run's float32 reference: its first step compared
    with float64."""
    case = Case(recompute=run.model.activation_checkpointing)
    single = run_for_case(run, case, 1, pairs)
    try:
        float32, selections = reference(single, (), device)
        exact, _ = reference(single, (), device, float64=True, selections=selections)
    except (RuntimeError, MemoryError) as error:
        # Out of memory, or an operation without a float64 implementation.
        _free_memory()
        return {"no_float64_reference": f"{name}: {str(error).splitlines()[0]}"}
    differences = compare_traces(float32, exact)
    worst = {key: largest(differences, key)[1] for key in differences if "later" not in key}
    return {"run": name, "float32_error": worst}


def _save(tensors: Trace, path: Path) -> None:
    """Write a file that exists only if it is complete."""
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    part.replace(path)


def _is_rounded(case: Case) -> bool:
    """Whether the forward pass uses weights rounded to bfloat16."""
    return case.precision == "bf16" and stage_of(case) > 0


def _has_other_rounding(run: RunConfig) -> bool:
    """Whether the case's MoE layers round at other points than the reference's, in bfloat16.

    The loop backend does with expert parallelism; without it, the loop accumulates in float32.
    """
    return run.moe.backend == "loop" and run.parallel.expert_parallel_size > 1


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    """One rank started by `pretrain.parity.launch`."""
    parser = argparse.ArgumentParser(description="one rank of vlmoe parity")
    parser.add_argument("job", type=Path)
    job = Job.from_json(parser.parse_args().job.read_text(encoding="utf-8"))
    environment = rank_environment()

    def on_message(message: dict[str, Any]) -> None:
        if environment.rank == 0:
            append_message(job.messages_path(0), message)

    run_job(job, environment, on_message)


if __name__ == "__main__":
    main()
