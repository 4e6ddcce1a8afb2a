"""Helpers for command lines: help formatting and sub-commands."""

from __future__ import annotations

import argparse
from typing import Any

Subparsers = Any
"""The return type of `ArgumentParser.add_subparsers`, which has no public name."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of examples and leaves enough width for long options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


def add_command(
    subparsers: Subparsers, name: str, *, summary: str, description: str, examples: str = ""
) -> argparse.ArgumentParser:
    """Add a sub-command and return its parser.

    Args:
        subparsers: Where to add it.
        name: Name of the command.
        summary: One line for the list of commands.
        description: What it does, shown at the top of its help.
        examples: Command lines, shown at the end of its help.
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
    """Add a command that only contains sub-commands, such as `vlmoe data`."""
    parser = add_command(subparsers, name, summary=summary, description=summary)
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
