"""`vlmoe caption`: write captions for a person's own pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.common.commands import Subparsers, add_command

_EXAMPLES = """\
  vlmoe caption runs/quickstart cat.png
  vlmoe caption runs/quickstart holiday/*.jpg"""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "caption",
        summary="write captions for pictures",
        examples=_EXAMPLES,
        description="Write a caption for each picture with a trained model, word by word (greedily).",
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=Path, help="folder of a run that has a checkpoint"
    )
    parser.add_argument("images", metavar="IMAGE", type=Path, nargs="+", help="picture files")
    parser.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> None:
    """Write and print."""
    from pretrain.evaluate.command import caption_command

    caption_command(args.run_dir, args.images)
