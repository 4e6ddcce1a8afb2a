"""`vlmoe parity`: checks the selected cases of a run for each world size.

A case is one combination of parallel layout, precision, missing pairs and loss terms.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.common.config import dump_yaml, join_problems
from data_pipeline.common.errors import ConfigError
from pretrain.config.presets import load_run
from pretrain.config.schema import RunConfig
from pretrain.parallel.environment import check_started_by_torchrun
from pretrain.parity.case_runs import min_global_batch_size, run_problems, unsupported_reason
from pretrain.parity.job import Job, Result
from pretrain.parity.launch import launch_local_ranks
from pretrain.parity.report import Report
from pretrain.parity.scale_down import shrink
from pretrain.parity.selection import parse_cases


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """Options of the command."""

    world_sizes: Sequence[int]
    """Numbers of ranks to start on this machine, one after the other; ignored under torchrun."""
    cases: Sequence[str]
    """See `pretrain.parity.selection`."""
    small: bool = False
    """Scale the model down."""
    pairs: int | None = None
    """Global batch size; None for the smallest that all selected cases can split."""
    timeout_seconds: float = 300.0
    """Time limit of one case."""
    out: Path | None = None
    """JSON report."""


def check_parity(run_file: str, overrides: Sequence[str], options: ParityOptions) -> bool:
    """Check a run and print the results.

    Args:
        run_file: A run file, or the name of a preset.
        overrides: `key=value` settings that take precedence over the file.
        options: Which cases, and how.

    Returns:
        Whether every case agrees with a single process.

    Raises:
        VlmError: The run cannot be checked, or no selected case is supported.
    """
    check_started_by_torchrun()
    run = load_run(run_file, overrides)
    run = shrink(run) if options.small else run
    is_launched = "RANK" in os.environ
    world_sizes = options.world_sizes
    if is_launched:
        world_sizes = [int(os.environ.get("WORLD_SIZE", "1"))]
    # Errors in --cases are raised before the table is printed.
    for world_size in world_sizes:
        parse_cases(options.cases, run, world_size)

    report = Report(
        metadata={"run": run_file, "settings": list(overrides), "small": options.small},
        out=options.out,
        is_rank_zero=os.environ.get("RANK", "0") == "0",
    )
    report.print_header()
    run_cases = _run_in_this_process if is_launched else launch_local_ranks
    with tempfile.TemporaryDirectory(prefix="vlmoe-parity-") as folder:
        for world_size in world_sizes:
            job_folder = Path(folder) / str(world_size)
            job_folder.mkdir()
            job = _make_job(run, world_size, options, job_folder, report)
            if job.cases:
                report.start_world_size(world_size, len(job.cases))
                run_cases(job, world_size, report.handle_message)
    report.finish()

    if all(result.status == "unsupported" for result in report.results):
        raise ConfigError(
            "none of the selected cases is supported, for the reasons above; select others with "
            "--cases"
        )
    return report.is_ok


def _make_job(
    run: RunConfig, world_size: int, options: ParityOptions, folder: Path, report: Report
) -> Job:
    """The supported cases of a world size; unsupported ones are added to the report."""
    selected = parse_cases(options.cases, run, world_size)
    pairs = options.pairs or min_global_batch_size(selected, run, world_size)
    problems = run_problems(run, world_size, pairs)
    if problems:
        raise ConfigError(join_problems(problems, "this run cannot be checked"))

    cases = []
    for case in selected:
        reason = unsupported_reason(run, case, world_size, pairs)
        if not reason:
            cases.append(case)
            continue
        report.add(Result(world_size=world_size, case=case, status="unsupported", reason=reason))

    path = folder / "run.yaml"
    path.write_text(dump_yaml(run), encoding="utf-8")
    return Job(
        runs={"run": str(path)},
        cases=tuple(cases),
        pairs=pairs,
        folder=str(folder),
        seconds=options.timeout_seconds,
    )


def _run_in_this_process(
    job: Job, world_size: int, on_message: Callable[[dict[str, Any]], None]
) -> None:
    """Run the job on the ranks that torchrun started. Collective."""
    from pretrain.parallel.environment import rank_environment
    from pretrain.parity.worker import run_job

    run_job(job, rank_environment(), on_message)
