"""`vlmoe settings`: prints every setting of a run file with its default and description.

The text is generated from the configuration dataclasses.
"""

from __future__ import annotations

import argparse

from data_pipeline.common.commands import Subparsers, add_command

_EXAMPLES = """\
  vlmoe settings
  vlmoe settings data
  vlmoe settings data.augment
  vlmoe settings moe.top_k           # one setting
  vlmoe settings data.train          # settings of one source of a mixture

The output is a valid run file with all defaults."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "settings",
        summary="print every setting of a run file with its default and description",
        examples=_EXAMPLES,
        description="Print the settings of a run file: all of them, or those of one section.",
    )
    parser.add_argument(
        "section",
        metavar="SECTION",
        nargs="?",
        default="",
        help="such as data, data.augment or moe.top_k (default: all sections)",
    )
    parser.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> None:
    """Run the command."""
    from data_pipeline.common.describe_settings import describe_settings
    from pretrain.config.schema import RunConfig

    print(describe_settings(RunConfig, args.section), end="")
