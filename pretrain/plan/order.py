"""The order in which a run reads its samples, printed; nothing is trained."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.common import storage
from data_pipeline.common.errors import ConfigError
from data_pipeline.common.processes import usable_cpus
from data_pipeline.loading.order_report import (
    OrderSettings,
    format_step,
    list_steps,
    measure_shuffle,
)
from data_pipeline.loading.sources import Source, open_sources
from data_pipeline.shards.manifest import MANIFEST_NAME
from data_pipeline.shards.run_indexing import (
    index_for_run,
    needs_indexing,
    run_manifest_folder,
)
from pretrain.config.presets import load_run, run_path
from pretrain.config.schema import RunConfig
from pretrain.config.validate import NO_TRAINING_DATA


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
        VlmError: The run, a manifest or a drop-list is invalid, or shards without a manifest cannot
            be read.
    """
    path = run_path(run_file)
    # Not validated across sections: the order does not depend on the parallel layout.
    run = load_run(path, overrides)
    if not run.data.train:
        raise ConfigError(f"{path}: {NO_TRAINING_DATA}")
    with tempfile.TemporaryDirectory(prefix="vlmoe-order-") as folder:
        _print_order(path, run, _open_sources(run, path.parent, folder), options)


def _open_sources(run: RunConfig, run_folder: Path, folder: str) -> tuple[Source, ...]:
    """The sources of a run; shards without a manifest are indexed as in training.

    Args:
        run: The run.
        run_folder: Has the manifests of such shards if the run has been trained in it.
        folder: Where to write other manifests.
    """
    seconds = min(60.0, run.data.timeout_seconds)
    indexed: dict[str, str] = {}
    for address in dict.fromkeys(source.shards for source in run.data.sources):
        if not needs_indexing(address, timeout_seconds=seconds):
            continue
        indexed[address] = run_manifest_folder(run_folder, address, run.data.phase)
        if not storage.exists(storage.join(indexed[address], MANIFEST_NAME)):
            indexed[address] = run_manifest_folder(folder, address)
            index_for_run(
                address,
                indexed[address],
                workers=usable_cpus(),
                timeout_seconds=run.data.timeout_seconds,
            )
    return open_sources(run.data.sources, timeout_seconds=seconds, manifest_urls=indexed)


def _print_order(
    path: Path, run: RunConfig, sources: Sequence[Source], options: OrderOptions
) -> None:
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

    if run.data.phase > 1 and not options.as_json:
        print(f"phase {run.data.phase}: steps and positions count from its beginning")
    steps = list_steps(sources, settings, options.steps, keys=options.keys)
    if options.as_json:
        # ASCII only: sample keys are untrusted and could contain terminal control sequences.
        content = {
            "run": str(path),
            "phase": run.data.phase,
            "world_size": options.world_size,
            "steps": list(steps),
        }
        print(json.dumps(content))
        return
    for step in steps:
        print(format_step(step))
