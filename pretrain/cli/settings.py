"""`vlmoe settings`: every setting of a run with its default and its meaning, from the code that
owns it."""

from __future__ import annotations

import argparse

from data_pipeline.common.commands import Subparsers, add_command

_EXAMPLES = """\
  vlmoe settings
  vlmoe settings data
  vlmoe settings data.augment
  vlmoe settings data.train          # what a source of a mixture may have

What is printed is a valid run file with all defaults."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "settings",
        summary="every setting with its default and its meaning",
        examples=_EXAMPLES,
        description="Print what a run file may hold: all settings, or those of one section.",
    )
    parser.add_argument(
        "section", metavar="SECTION", nargs="?", default="", help="such as data or data.augment"
    )
    parser.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> None:
    """Print the section."""
    from data_pipeline.common.explain import explain
    from pretrain.config.schema import RunConfig

    print(explain(RunConfig, args.section), end="")
