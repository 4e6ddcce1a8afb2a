"""The order in which a run reads its samples, printed; nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.loading.order_report import (
    OrderSettings,
    format_step,
    list_steps,
    measure_shuffle,
)
from data_pipeline.loading.sources import open_sources
from pretrain.config.presets import load_run, run_path


@dataclass(frozen=True, kw_only=True)
class OrderOptions:
    """Options of `vlmoe data order`."""

    steps: range
    """Steps to list, counted from 1."""
    world_size: int
    skip: tuple[tuple[int, int], ...]
    """Ranges of positions to leave out, `[first, end)`."""
    keys: bool
    """Read shard indices to print sample keys."""
    quality: bool
    """Compare the shuffle with a random permutation instead of listing samples."""
    as_json: bool


def print_order(run_file: str, overrides: Sequence[str], options: OrderOptions) -> None:
    """Print the samples of each step, or the quality of the shuffle.

    Raises:
        VlmError: The run, a manifest or a drop-list is invalid.
    """
    path = run_path(run_file)
    # Not validated across sections: the order does not depend on the parallel layout.
    run = load_run(path, overrides)
    sources = open_sources(run.data.sources, timeout_seconds=min(60.0, run.data.timeout_seconds))
    settings = OrderSettings(
        data=run.data,
        seed=run.seed,
        global_batch_size=run.batch.global_batch_size,
        micro_batch_size=run.batch.micro_batch_size,
        world_size=options.world_size,
        skip=options.skip,
    )
    if options.quality:
        results = measure_shuffle(sources, settings)
        if options.as_json:
            print(json.dumps({result.name: result.to_json() for result in results}))
        else:
            print("\n\n".join(result.text(run.data.shuffle_window) for result in results))
        return

    steps = list_steps(sources, settings, options.steps, keys=options.keys)
    if options.as_json:
        # ASCII only: sample keys are untrusted and could contain terminal control sequences.
        content = {"run": str(path), "world_size": options.world_size, "steps": list(steps)}
        print(json.dumps(content))
        return
    for step in steps:
        print(format_step(step))
