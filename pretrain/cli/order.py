"""`vlmoe data order`: lists the samples of each rank and micro-batch in given steps.

The order is computed from the run file and the manifests, without reading shards.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipeline.common.commands import Subparsers, add_command
from data_pipeline.common.escaping import escape_control
from pretrain.cli.common import add_run_arguments

_EXAMPLES = """\
  vlmoe data order quickstart --steps 1
  vlmoe data order run.yaml --steps 500:502 --world-size 8
  vlmoe data order run.yaml --steps 7 --world-size 2 --json batch.global_batch_size=64
  vlmoe data order run.yaml --quality data.shuffle_window=64

Steps count from 1, as in metrics.jsonl. --quality compares the shuffle with a uniformly random
permutation. A larger data.shuffle_window is closer to it, but keeps more shards open."""

_FIELDS = ("position", "source", "epoch", "shard", "sample", "key")


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "order",
        summary="list the samples of each rank in given steps, or measure the shuffle",
        description="List which samples training reads in which order. Nothing is trained: the\n"
        "order follows from the run file and the manifests.",
        examples=_EXAMPLES,
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--steps",
        metavar="A:B",
        default="1",
        help="first and last step, or a single step (default: 1)",
    )
    parser.add_argument(
        "--world-size", metavar="N", type=int, default=1, help="number of ranks (default: 1)"
    )
    parser.add_argument(
        "--skip",
        metavar="A:B",
        action="append",
        default=[],
        help="leave out positions A to B - 1, as recorded in the loader state of a checkpoint; "
        "may be repeated (default: none)",
    )
    parser.add_argument(
        "--no-keys", action="store_true", help="omit sample keys; shard indices are not read"
    )
    parser.add_argument(
        "--quality",
        action="store_true",
        help="instead, compare the shuffle of each source with a random permutation",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of text")
    parser.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> None:
    """Run the command."""
    from data_pipeline.loading.sources import open_sources
    from pretrain.config.presets import load_run, run_path

    first, last = _parse_range(args, args.steps, "--steps")
    if not 1 <= first <= last:
        args.parser.error(f"--steps is {args.steps!r}; expected A:B with 1 <= A <= B")
    if args.world_size < 1:
        args.parser.error(f"--world-size is {args.world_size}, but must be at least 1")

    path = run_path(args.run)
    run = load_run(path, args.overrides)
    # The run is not validated: the order does not depend on the parallel layout.
    sources = open_sources(run.data.sources, timeout_seconds=min(60.0, run.data.timeout_seconds))
    if args.quality:
        print(_quality(run, sources, as_json=args.json))
        return

    steps = _order(args, run, sources, range(first, last + 1))
    if args.json:
        # ASCII only: sample keys are untrusted and could contain terminal control sequences.
        print(json.dumps({"run": str(path), "world_size": args.world_size, "steps": list(steps)}))
        return
    for step in steps:
        print(_format_step(step))


def _order(
    args: argparse.Namespace, run: Any, sources: Sequence[Any], steps: range
) -> Iterator[dict[str, Any]]:
    """The samples of each step as JSON values."""
    from data_pipeline.loading.batch_samplers import TrainBatchSampler
    from data_pipeline.loading.sources import make_order
    from data_pipeline.order.plan import micro_batches_per_step
    from data_pipeline.order.state import merge_ranges

    batch = run.batch
    skip = merge_ranges(_parse_range(args, text, "--skip") for text in args.skip)
    count = micro_batches_per_step(batch.global_batch_size, batch.micro_batch_size, args.world_size)
    order = make_order(sources, run.seed, run.data.shuffle_window)
    names = _SampleNames(sources, keys=not args.no_keys, data=run.data)
    samplers = [
        TrainBatchSampler(
            order=order,
            origin=0,
            skip=skip,
            rank=rank,
            global_batch_size=batch.global_batch_size,
            micro_batch_size=batch.micro_batch_size,
            micro_batches=count,
            world_size=args.world_size,
        )
        for rank in range(args.world_size)
    ]

    for step in steps:
        micro_batches = []
        for micro_batch in range(count):
            for rank, sampler in enumerate(samplers):
                samples = _samples(sampler, (step - 1) * count + micro_batch, names)
                micro_batches.append({"rank": rank, "micro_batch": micro_batch, "samples": samples})
        position_after = samplers[0].step_end(step - 1)
        yield {"step": step, "position_after": position_after, "micro_batches": micro_batches}


def _samples(sampler: Any, index: int, names: _SampleNames) -> list[dict[str, Any]]:
    """The samples of one rank's micro-batch `index`, counted from the start of training."""
    positions = [position for part in sampler.positions(index) for position in part]
    return [
        dict(zip(_FIELDS, (position, *names.of(ref)), strict=True))
        for position, ref in zip(positions, sampler.refs(index), strict=True)
    ]


class _SampleNames:
    """Names of samples; shard indices are read on first use."""

    def __init__(self, sources: Sequence[Any], *, keys: bool, data: Any) -> None:
        self._shards = [(source, entry) for source in sources for entry in source.manifest.shards]
        self._keys, self._data = keys, data
        self._indices: dict[int, Any] = {}

    def of(self, ref: Any) -> tuple[str, int, str, int, str]:
        """Source, epoch, shard, index in the shard, key."""
        source, entry = self._shards[ref.shard]
        return source.name, ref.epoch, entry.name, ref.sample, self._key(ref.shard, ref.sample)

    def _key(self, shard: int, sample: int) -> str:
        from data_pipeline.common.errors import DataError
        from data_pipeline.shards.manifest import load_index

        if not self._keys:
            return ""
        if shard not in self._indices:
            source, entry = self._shards[shard]
            try:
                self._indices[shard] = load_index(
                    source.manifest,
                    entry,
                    cache_dir=self._data.cache_dir,
                    timeout_seconds=self._data.request_seconds,
                )
            except DataError:
                # Training continues too, and counts the samples of the shard as corrupt.
                self._indices[shard] = None
        index = self._indices[shard]
        return index.key(sample) if index is not None else "#corrupt-index"


def _quality(run: Any, sources: Sequence[Any], *, as_json: bool) -> str:
    """Shuffle quality of each source, for the part of a batch that the source provides."""
    from dataclasses import asdict

    from data_pipeline.loading.sources import make_order
    from data_pipeline.order.shuffle_quality import format_quality_table, shuffle_quality

    window, pairs = run.data.shuffle_window, run.batch.global_batch_size
    fractions = make_order(sources, run.seed, window).fractions.at(0)
    results, tables = {}, []
    for source, fraction in zip(sources, fractions, strict=True):
        sizes = [
            entry.samples - len(source.dropped.get(shard, ()))
            for shard, entry in enumerate(source.manifest.shards)
        ]
        if not sum(sizes):
            continue
        batch = max(1, round(pairs * fraction))
        shuffled, perfect = shuffle_quality(sizes, run.seed, window, batch)
        results[source.name] = {"shuffled": asdict(shuffled), "perfect": asdict(perfect)}
        tables.append(
            f"{escape_control(source.name)}: {sum(sizes):,} samples in {len(sizes):,} shards, "
            f"shuffle_window {window}, {batch:,} of them in a batch\n"
            f"{format_quality_table(shuffled, perfect)}"
        )
    return json.dumps(results) if as_json else "\n\n".join(tables)


def _format_step(step: dict[str, Any]) -> str:
    """One step as a table."""
    rows = [sample for micro in step["micro_batches"] for sample in micro["samples"]]
    widths = {name: max(len(name), *(len(_cell(row[name])) for row in rows)) for name in _FIELDS}
    header = "  ".join(f"{name:<{widths[name]}}" for name in _FIELDS)

    lines = [f"step {step['step']:,}"]
    for micro in step["micro_batches"]:
        lines.append(f"  rank {micro['rank']}, micro-batch {micro['micro_batch']}")
        lines.append(f"    {header}".rstrip())
        for row in micro["samples"]:
            cells = "  ".join(f"{_cell(row[name]):<{widths[name]}}" for name in _FIELDS)
            lines.append(f"    {cells}".rstrip())
    return "\n".join(lines)


def _cell(value: object) -> str:
    """A value without control characters: keys and shard names are untrusted."""
    return escape_control(str(value))


def _parse_range(args: argparse.Namespace, text: str, option: str) -> tuple[int, int]:
    """`A:B`, or `A` for both."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if match is None:
        raise SystemExit(args.parser.error(f"{option} is {text!r}; expected integers A:B or A"))
    return int(match[1]), int(match[2] or match[1])
