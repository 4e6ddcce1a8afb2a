"""`vlmoe routing`: see which experts serve which modality, and what each of them sees."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.common.commands import Subparsers, add_command

_EXAMPLES = """\
  vlmoe routing runs/quickstart
  vlmoe routing runs/quickstart --set train --samples 5000
  vlmoe routing runs/quickstart --shards s3://bucket/others --out others-routing

The page routing.html needs no network and runs no script. Bars and numbers mean: share of a modality's tokens
that visit an expert; from image to text, whom it serves; its words, times their share of all text."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "routing",
        summary="see which experts serve what in a trained model",
        examples=_EXAMPLES,
        description="Send pairs through a trained model and show, for every layer and expert, what share of the "
        "patches and words it gets, how surely, which words and patches it sees most, and which experts "
        "are chosen together. Prints a table and writes a page, a picture and JSON.",
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=Path, help="folder of a run that has a checkpoint"
    )
    parser.add_argument(
        "--set",
        metavar="NAME",
        default="",
        help="a held-out set of the run, or train (default: the first held-out set)",
    )
    parser.add_argument(
        "--shards",
        metavar="MANIFEST",
        default="",
        help="a manifest, or the folder that holds one, instead of a set of the run",
    )
    parser.add_argument(
        "--samples", metavar="N", type=int, default=1000, help="pairs to look at (default: 1000)"
    )
    parser.add_argument(
        "--patches",
        metavar="N",
        type=int,
        default=4,
        help="patches to show of each expert (default: 4)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=None,
        help="folder for the files (default: RUN_DIR/routing)",
    )
    parser.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> None:
    """Look and print."""
    if args.set and args.shards:
        args.parser.error("--set and --shards both name what to look at; give one of them")
    for option, least in (("samples", 1), ("patches", 0)):
        if getattr(args, option) < least:
            args.parser.error(
                f"--{option} is {getattr(args, option)}, but must be at least {least}"
            )
    from pretrain.evaluate.routing.command import routing_command

    routing_command(
        args.run_dir,
        name=args.set,
        shards=args.shards,
        samples=args.samples,
        patches=args.patches,
        out=args.out,
    )
