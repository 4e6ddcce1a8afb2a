"""`vlmoe routing`: analyzes which tokens the experts of a trained model process."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.common.commands import Subparsers, add_command

_EXAMPLES = """\
  vlmoe routing runs/quickstart
  vlmoe routing runs/quickstart --set train --samples 5000
  vlmoe routing runs/quickstart --shards s3://bucket/others --out others-routing

The HTML report loads nothing from the network and contains no scripts."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "routing",
        summary="analyze which tokens each expert of a trained model processes",
        examples=_EXAMPLES,
        description="Run pairs through a trained model and report for every layer and expert: the\n"
        "fraction of image patches and text tokens, gate weights, the most characteristic words\n"
        "and patches, and which experts are activated together. Prints a table and writes an\n"
        "HTML report (routing.html), a heat map (routing.png) and JSON (routing.json).",
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=Path, help="run folder that contains a checkpoint"
    )
    parser.add_argument(
        "--set",
        metavar="NAME",
        default="",
        help="an evaluation set of the run, or train (default: the first evaluation set)",
    )
    parser.add_argument(
        "--shards",
        metavar="MANIFEST",
        default="",
        help="a manifest, folder or shards, instead of a set of the run",
    )
    parser.add_argument(
        "--samples",
        metavar="N",
        type=int,
        default=1000,
        help="number of pairs, a fixed random sample (default: 1000)",
    )
    parser.add_argument(
        "--patches",
        metavar="N",
        type=int,
        default=4,
        help="patches to show for each expert (default: 4)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=None,
        help="output folder (default: RUN_DIR/routing)",
    )
    parser.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.set and args.shards:
        args.parser.error("--set and --shards are mutually exclusive")
    for option, minimum in (("samples", 1), ("patches", 0)):
        value = getattr(args, option)
        if value < minimum:
            args.parser.error(f"--{option} is {value}, but must be at least {minimum}")
    from pretrain.evaluate.routing.command import routing_command

    routing_command(
        args.run_dir,
        name=args.set,
        shards=args.shards,
        samples=args.samples,
        patches=args.patches,
        out=args.out,
    )
