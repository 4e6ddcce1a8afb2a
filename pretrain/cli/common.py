"""What the commands of a run share: the run file with its settings, and the rank they were started
as."""

from __future__ import annotations

import argparse
import os


def started_as() -> tuple[int, int]:
    """This process's rank and the number of ranks, as the launcher set them; (0, 1) without one.

    Values that are no numbers are refused later, where devices are chosen.
    """
    rank, world_size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return int(rank) if rank.isdigit() else 0, int(world_size) if world_size.isdigit() else 1


def add_run(parser: argparse.ArgumentParser) -> None:
    """Take a run file and settings that win over it."""
    parser.add_argument(
        "run",
        metavar="RUN.yaml",
        help="a run file, or the name of a preset: quickstart, tiny, s16, b16, l16, h14",
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="settings that win over the file, such as optim.lr=3e-4",
    )
    parser.set_defaults(takes_overrides=True)
