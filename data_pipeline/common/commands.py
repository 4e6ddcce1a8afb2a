"""What command lines share: how help looks, and how sub-commands are added."""

from __future__ import annotations

import argparse
from typing import Any

Subparsers = Any
"""argparse's own type for the set of sub-commands has no public name."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps examples as they are written, and gives long options room."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


def add_command(
    subparsers: Subparsers, name: str, *, summary: str, description: str, examples: str = ""
) -> argparse.ArgumentParser:
    """Add a sub-command.

    Args:
        subparsers: What it is added to.
        name: How it is called.
        summary: One line for the list of commands.
        description: What it does, at the head of its own help.
        examples: Command lines, at the foot of its help.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        epilog=f"examples:\n{examples}" if examples else None,
    )
    parser.set_defaults(parser=parser, takes_overrides=False)
    return parser


def add_group(subparsers: Subparsers, name: str, *, summary: str) -> Subparsers:
    """Add a command that only holds further ones, such as `vlmoe data index`."""
    parser = add_command(subparsers, name, summary=summary, description=summary)
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
