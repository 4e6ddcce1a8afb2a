"""`vlmoe data order`: which samples each rank and micro-batch of some steps gets, from arithmetic
and indices."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipeline.common.commands import Subparsers, add_command
from data_pipeline.common.harmless import harmless
from pretrain.cli.common import add_run

_EXAMPLES = """\
  vlmoe data order quickstart --steps 1
  vlmoe data order run.yaml --steps 500:502 --world-size 8
  vlmoe data order run.yaml --steps 7 --world-size 2 --json batch.global_batch_size=64
  vlmoe data order run.yaml --quality data.shuffle_window=64

Steps count from 1, as in metrics.jsonl. --quality compares the shuffle with a perfect one; a larger
data.shuffle_window brings it nearer, and needs more shards at hand."""

_FIELDS = ("position", "source", "epoch", "shard", "sample", "key")


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "order",
        summary="show which samples each rank gets in some steps, or how good the shuffle is",
        description="Show the order of training without training: it follows from the run file and the manifests.",
        examples=_EXAMPLES,
    )
    add_run(parser)
    parser.add_argument(
        "--steps", metavar="A:B", default="1", help="first and last step, or one (default: 1)"
    )
    parser.add_argument(
        "--world-size", metavar="N", type=int, default=1, help="number of ranks (default: 1)"
    )
    parser.add_argument(
        "--skip",
        metavar="A:B",
        action="append",
        default=[],
        help="positions A to B - 1 are jumped, as the loader's state in a checkpoint says; may be "
        "repeated",
    )
    parser.add_argument(
        "--no-keys", action="store_true", help="do not read the shards' indices for the keys"
    )
    parser.add_argument(
        "--quality", action="store_true", help="compare the shuffle with a perfect one instead"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> None:
    """Read the run and its manifests, and print."""
    from data_pipeline.loading.sources import open_sources
    from pretrain.config.presets import load_run, run_path

    first, last = _pair(args, args.steps, "--steps")
    if not 1 <= first <= last:
        args.parser.error(f"--steps is {args.steps!r}, but steps count from 1 and must rise")
    steps = range(first, last + 1)
    if args.world_size < 1:
        args.parser.error(f"--world-size is {args.world_size}, but must be at least 1")
    path = run_path(args.run)
    run = load_run(path, args.overrides)
    # Not all of a run is checked: the order does not ask whether the experts fit the ranks.
    sources = open_sources(run.data.sources, timeout_seconds=min(60.0, run.data.timeout_seconds))
    if args.quality:
        print(_quality(run, sources, as_json=args.json))
        return
    facts = _order(args, run, sources, steps)
    if args.json:
        # In ASCII: keys are texts of others, which could steer a terminal.
        print(json.dumps({"run": str(path), "world_size": args.world_size, "steps": list(facts)}))
        return
    for step in facts:
        print(_render(step))


def _order(
    args: argparse.Namespace, run: Any, sources: Sequence[Any], steps: range
) -> Iterator[dict[str, Any]]:
    """The steps' samples, as plain values."""
    from data_pipeline.loading.schedules import TrainSchedule
    from data_pipeline.loading.sources import make_order
    from data_pipeline.order.plan import micro_batches_per_step
    from data_pipeline.order.state import joined

    batch = run.batch
    skip = joined(_pair(args, text, "--skip") for text in args.skip)
    count = micro_batches_per_step(batch.global_batch_size, batch.micro_batch_size, args.world_size)
    order = make_order(sources, run.seed, run.data.shuffle_window)
    names = _Names(sources, keys=not args.no_keys, data=run.data)
    ranks = [
        TrainSchedule(
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
        micro_batches = [
            {
                "rank": rank,
                "micro_batch": micro,
                "samples": [
                    dict(zip(_FIELDS, (position, *names.of(ref)), strict=True))
                    for position, ref in zip(
                        _flat(schedule.positions(number)), schedule.refs(number), strict=True
                    )
                ],
            }
            for micro in range(count)
            for rank, schedule in enumerate(ranks)
            for number in [(step - 1) * count + micro]
        ]
        end = ranks[0].step_end(step - 1)
        yield {"step": step, "position_after": end, "micro_batches": micro_batches}


class _Names:
    """What people call a sample; indices are opened when they are needed first."""

    def __init__(self, sources: Sequence[Any], *, keys: bool, data: Any) -> None:
        self._shards = [(source, entry) for source in sources for entry in source.manifest.shards]
        self._keys, self._data = keys, data
        self._indices: dict[int, Any] = {}

    def of(self, ref: Any) -> tuple[str, int, str, int, str]:
        """Source, epoch, shard, number in the shard, key."""
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
                # As the trainer will: it goes on, and counts the shard's samples as bad.
                self._indices[shard] = None
        index = self._indices[shard]
        return index.key(sample) if index is not None else "#bad-index"


def _quality(run: Any, sources: Sequence[Any], *, as_json: bool) -> str:
    """Each source's shuffle beside a perfect one; of a batch, the part that comes from the
    source."""
    from dataclasses import asdict

    from data_pipeline.loading.sources import make_order
    from data_pipeline.order.shuffle_quality import quality_table, shuffle_quality

    window, pairs = run.data.shuffle_window, run.batch.global_batch_size
    shares = make_order(sources, run.seed, window).shares.at(0)
    found, tables = {}, []
    for source, share in zip(sources, shares, strict=True):
        sizes = [
            entry.samples - len(source.dropped.get(number, ()))
            for number, entry in enumerate(source.manifest.shards)
        ]
        if not sum(sizes):
            continue
        batch = max(1, round(pairs * share))
        mine, perfect = shuffle_quality(sizes, run.seed, window, batch)
        found[source.name] = {"shuffled": asdict(mine), "perfect": asdict(perfect)}
        tables.append(
            f"{harmless(source.name)}: {sum(sizes):,} samples in {len(sizes):,} shards, "
            f"shuffle_window {window}, {batch:,} of them in a batch\n{quality_table(mine, perfect)}"
        )
    return json.dumps(found) if as_json else "\n\n".join(tables)


def _render(step: dict[str, Any]) -> str:
    """One step for a person."""
    rows = [sample for micro in step["micro_batches"] for sample in micro["samples"]]
    widths = {name: max(len(name), *(len(_cell(row[name])) for row in rows)) for name in _FIELDS}
    lines = [f"step {step['step']:,}"]
    for micro in step["micro_batches"]:
        lines.append(f"  rank {micro['rank']}, micro-batch {micro['micro_batch']}")
        lines.append("    " + "  ".join(f"{name:<{widths[name]}}" for name in _FIELDS).rstrip())
        lines += [
            "    " + "  ".join(f"{_cell(row[name]):<{widths[name]}}" for name in _FIELDS).rstrip()
            for row in micro["samples"]
        ]
    return "\n".join(lines)


def _cell(value: object) -> str:
    """Keys and names of shards are texts of others."""
    return harmless(str(value))


def _pair(args: argparse.Namespace, text: str, option: str) -> tuple[int, int]:
    """`A:B`, or `A` for both."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if match is None:
        raise SystemExit(args.parser.error(f"{option} is {text!r}; write A:B or A, whole numbers"))
    return int(match[1]), int(match[2] or match[1])


def _flat(parts: Sequence[range]) -> Iterator[int]:
    return (position for part in parts for position in part)
