"""`vlmoe caption`: generates captions for image files."""

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
        summary="generate captions for image files",
        examples=_EXAMPLES,
        description="Generate a caption for each image with a trained model (greedy decoding). "
        "Files that are not images are listed with the reason; the exit status is then 2.",
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=Path, help="run folder that contains a checkpoint"
    )
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="image files; write ./-x.png for a name that starts with -",
    )
    parser.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> None:
    """Run the command."""
    from pretrain.evaluate.caption_files import caption_command

    caption_command(args.run_dir, args.images)
