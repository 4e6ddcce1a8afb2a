"""`vlmoe check-parallel`: checks the selected cells of a run for each world size.

A cell is one combination of parallel layout, precision and test case.
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
from pretrain.check.cell_runs import min_global_batch_size, run_problems, unsupported_reason
from pretrain.check.cell_selection import parse_cells
from pretrain.check.collector import Collector
from pretrain.check.job import Case, Job, Outcome
from pretrain.check.launch import launch_local_ranks
from pretrain.check.scale_down import shrink
from pretrain.config.presets import load_run
from pretrain.config.schema import RunConfig
from pretrain.parallel.environment import check_started_by_torchrun


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Options of the command."""

    world_sizes: Sequence[int]
    """Numbers of ranks to start on this machine, one after the other; ignored under torchrun."""
    cells: Sequence[str]
    """See `pretrain.check.cell_selection`."""
    small: bool = False
    """Scale the model down."""
    pairs: int | None = None
    """Global batch size; None for the smallest that all selected cells can split."""
    timeout_seconds: float = 300.0
    """Time limit of one cell."""
    out: Path | None = None
    """JSON report."""


def check_parallel(run_file: str, overrides: Sequence[str], options: CheckOptions) -> bool:
    """Check a run and print the results.

    Args:
        run_file: A run file, or the name of a preset.
        overrides: `key=value` settings that take precedence over the file.
        options: Which cells, and how.

    Returns:
        Whether every cell agrees with a single process.

    Raises:
        VlmError: The run cannot be checked, or no selected cell is supported.
    """
    check_started_by_torchrun()
    run = load_run(run_file, overrides)
    run = shrink(run) if options.small else run
    is_launched = "RANK" in os.environ
    world_sizes = options.world_sizes
    if is_launched:
        world_sizes = [int(os.environ.get("WORLD_SIZE", "1"))]
    # Errors in --cells are raised before the table is printed.
    for world_size in world_sizes:
        parse_cells(options.cells, run, world_size)

    collector = Collector(
        metadata={"run": run_file, "settings": list(overrides), "small": options.small},
        out=options.out,
        is_rank_zero=os.environ.get("RANK", "0") == "0",
    )
    collector.print_header()
    run_cells = _run_in_this_process if is_launched else launch_local_ranks
    with tempfile.TemporaryDirectory(prefix="vlmoe-check-") as folder:
        for world_size in world_sizes:
            job_folder = Path(folder) / str(world_size)
            job_folder.mkdir()
            job = _make_job(run, world_size, options, job_folder, collector)
            if job.cases:
                collector.start_world_size(world_size, len(job.cases))
                run_cells(job, world_size, collector.handle_message)
    collector.finish()

    if all(outcome.status == "unsupported" for outcome in collector.outcomes):
        raise ConfigError(
            "none of the selected cells is supported, for the reasons above; select others with "
            "--cells"
        )
    return collector.is_ok


def _make_job(
    run: RunConfig, world_size: int, options: CheckOptions, folder: Path, collector: Collector
) -> Job:
    """The supported cells of a world size; unsupported ones are added to the collector."""
    cells = parse_cells(options.cells, run, world_size)
    pairs = options.pairs or min_global_batch_size(cells, run, world_size)
    problems = run_problems(run, world_size, pairs)
    if problems:
        raise ConfigError(join_problems(problems, "this run cannot be checked in any cell"))

    cases = []
    for cell in cells:
        reason = unsupported_reason(run, cell, world_size, pairs)
        if not reason:
            cases.append(Case("run", cell))
            continue
        collector.add(
            Outcome(
                run=run.name,
                world_size=world_size,
                cell=cell,
                status="unsupported",
                reason=reason,
            )
        )

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
    from pretrain.check.worker import run_job
    from pretrain.parallel.environment import rank_environment

    run_job(job, rank_environment(), on_message)
