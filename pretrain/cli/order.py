"""`vlmoe data order`: lists the samples of each rank and micro-batch in given steps.

The order is computed from the run file and the manifests. Shards that have no manifest are indexed
for it, as in training.
"""

from __future__ import annotations

import argparse
import re

from data_pipeline.common.commands import Subparsers, add_command
from pretrain.cli.common import add_run_arguments

_EXAMPLES = """\
  vlmoe data order quickstart --steps 1
  vlmoe data order run.yaml --steps 500:502 --world-size 8
  vlmoe data order run.yaml --steps 7 --world-size 2 --json batch.global_batch_size=64
  vlmoe data order run.yaml --quality data.shuffle_window=64

Steps count from 1, as in metrics.jsonl. With data.phase above 1, steps and positions, also those
of --skip, count from the beginning of the phase, which the log of the run and `vlmoe data ledger`
show. --quality compares the shuffle with a uniformly random permutation. A larger
data.shuffle_window is closer to it, but keeps more shards open. Shards without a manifest are read
once from end to end; for the config.yaml of a run folder, the manifests that training stored there
are used."""


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
    first, last = _parse_range(args, args.steps, "--steps")
    if not 1 <= first <= last:
        args.parser.error(f"--steps is {args.steps!r}; expected A:B with 1 <= A <= B")
    if args.world_size < 1:
        args.parser.error(f"--world-size is {args.world_size}, but must be at least 1")
    from pretrain.plan.order import OrderOptions, print_order

    options = OrderOptions(
        steps=range(first, last + 1),
        world_size=args.world_size,
        skip=tuple(_parse_range(args, text, "--skip") for text in args.skip),
        keys=not args.no_keys,
        quality=args.quality,
        as_json=args.json,
    )
    print_order(args.run, args.overrides, options)


def _parse_range(args: argparse.Namespace, text: str, option: str) -> tuple[int, int]:
    """`A:B`, or `A` for both."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if match is None:
        raise SystemExit(args.parser.error(f"{option} is {text!r}; expected integers A:B or A"))
    return int(match[1]), int(match[2] or match[1])
