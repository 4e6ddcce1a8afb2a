"""`vlmoe eval`: evaluates a trained model on held-out pairs."""

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
        summary="evaluate a trained model on held-out pairs",
        examples=_EXAMPLES,
        description="Print recall at 1, 5 and 10 of image-to-text and text-to-image retrieval\n"
        "with the recall of a random order, the percentage of exactly matching generated\n"
        "captions, and the accuracy of caption tokens. All captions of an image count as correct.",
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=Path, help="run folder that contains a checkpoint"
    )
    parser.add_argument(
        "--shards",
        metavar="MANIFEST",
        nargs="+",
        default=None,
        help="manifests, folders or shards (default: the evaluation sets of the run)",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        default=None,
        help="candidate captions for retrieval, one per line; requires --shards "
        "(default: the distinct captions of each set)",
    )
    parser.add_argument(
        "--caption-key",
        metavar="KEY",
        action="append",
        default=None,
        help="where the captions of --shards are: txt, or json:FIELD, such as json:captions for\n"
        "the five of COCO; may be repeated (default: data.caption_keys of the run)",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        default=None,
        help="also write the results to FILE as JSON",
    )
    parser.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.labels and not args.shards:
        args.parser.error(
            "--labels requires --shards: labels of the run's sets are set in eval.sets"
        )
    if args.caption_key and not args.shards:
        args.parser.error(
            "--caption-key requires --shards: the keys of the run's sets are set in eval.sets"
        )
    from pretrain.evaluate.command import eval_command

    eval_command(args.run_dir, args.shards, args.labels, args.json, caption_keys=args.caption_key)
