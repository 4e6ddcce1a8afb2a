"""Shared by the commands that read a run file: its arguments, and the rank of this process."""

from __future__ import annotations

import argparse
import os


def launched_rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the world size set by the launcher; (0, 1) without a launcher.

    Invalid values are ignored here; `pretrain.parallel.environment` rejects them.
    """
    rank, world_size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return int(rank) if rank.isdigit() else 0, int(world_size) if world_size.isdigit() else 1


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a run file and `key=value` overrides."""
    parser.add_argument(
        "run",
        metavar="RUN.yaml",
        help="run file, or the name of a preset: quickstart, first, tiny, s16, b16, l16, h14",
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="settings that take precedence over the file, such as optim.lr=3e-4",
    )
    parser.set_defaults(takes_overrides=True)
