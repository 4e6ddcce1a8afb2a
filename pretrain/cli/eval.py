"""`vlmoe eval`: judge a trained model on held-out pairs."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.common.commands import Subparsers, add_command

_EXAMPLES = """\
  vlmoe eval runs/quickstart
  vlmoe eval runs/quickstart --json runs/quickstart/eval.json
  vlmoe eval runs/quickstart --shards data/mine/manifest.json --labels labels.txt"""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "eval",
        summary="judge a trained model on held-out pairs",
        examples=_EXAMPLES,
        description="Retrieval in both directions at 1, 5 and 10 against chance, and how many captions and "
        "caption tokens are right, for the run's held-out sets or for shards named here.",
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=Path, help="folder of a run that has a checkpoint"
    )
    parser.add_argument(
        "--shards",
        metavar="MANIFEST",
        nargs="+",
        default=None,
        help="manifests, or folders that hold one, instead of the run's held-out sets",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        default=None,
        help="one caption a line to rank each picture against, instead of the set's own captions",
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path, default=None, help="write the results there too"
    )
    parser.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> None:
    """Judge and print."""
    if args.labels and not args.shards:
        args.parser.error("--labels needs --shards: the run's own sets have their labels already")
    from pretrain.evaluate.command import eval_command

    eval_command(args.run_dir, args.shards, args.labels, args.json)
