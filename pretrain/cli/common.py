"""What the sub-commands share: how help looks, and how settings are taken."""

from __future__ import annotations

import argparse
import os
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
        name, help=summary, description=description, formatter_class=_HelpFormatter, allow_abbrev=False,
        epilog=f"examples:\n{examples}" if examples else None,
    )
    parser.set_defaults(parser=parser, takes_overrides=False)
    return parser


def add_group(subparsers: Subparsers, name: str, *, summary: str) -> Subparsers:
    """Add a command that only holds further ones, such as `vlmoe data index`."""
    parser = add_command(subparsers, name, summary=summary, description=summary)
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)


def started_as() -> tuple[int, int]:
    """This process's rank and the number of ranks, as the launcher set them; (0, 1) without one.

    Values that are no numbers are refused later, where devices are chosen.
    """
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return int(rank) if rank.isdigit() else 0, int(world) if world.isdigit() else 1


def add_run(parser: argparse.ArgumentParser) -> None:
    """Take a run file and settings that win over it."""
    parser.add_argument("run", metavar="RUN.yaml",
                        help="a run file, or the name of a preset: quickstart, tiny, s16, b16, l16, h14")
    parser.add_argument("overrides", metavar="key=value", nargs="*",
                        help="settings that win over the file, such as optim.lr=3e-4")
    parser.set_defaults(takes_overrides=True)
