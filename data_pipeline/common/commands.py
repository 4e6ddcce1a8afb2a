"""Helpers for command lines: help formatting, sub-commands, and output that cannot fail."""

from __future__ import annotations

import argparse
import io
import sys
from typing import Any, NoReturn

from data_pipeline.common.escaping import escape_control

Subparsers = Any
"""The return type of `ArgumentParser.add_subparsers`, which has no public name."""


class CommandParser(argparse.ArgumentParser):
    """A parser, also of sub-commands, whose errors escape control characters of arguments."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and exit with status 2."""
        super().error(escape_control(message))


def escape_unencodable_output() -> None:
    """Print characters that the locale cannot encode as escapes, instead of failing.

    Text from outside, such as a file name that is not UTF-8, must not stop a command.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_error(message: str, *, label: str = "error") -> None:
    """Print an error to standard error; control characters are escaped, line feeds are kept."""
    print(f"{label}: {escape_control(message, lines=True)}", file=sys.stderr)


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
