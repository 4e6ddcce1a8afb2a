"""Arguments that all studies have: `--run`, `--out`, `--seeds`, `--steps` and settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tools.arguments import tool_parser


def study_parser(
    module: str, description: str | None, epilog: str, *, out: str, seeds: Sequence[int], steps: int
) -> argparse.ArgumentParser:
    """A parser with the arguments that all studies have.

    Args:
        module: The module that `python -m` runs.
        description: What it compares.
        epilog: Printed after the arguments.
        out: Default of `--out`.
        seeds: Default of `--seeds`.
        steps: Default of `--steps`.
    """
    parser = tool_parser(module, description, epilog)
    parser.add_argument(
        "--run",
        default="quickstart",
        help="a run file or preset with experts (default: quickstart)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(out), help="folder of all runs (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=list(seeds),
        help=f"one run of each kind per seed (default: {' '.join(map(str, seeds))})",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=steps,
        help="optimizer steps of each run; 0 for those of the run (default: %(default)s)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings of all runs, such as optim.lr=1e-3",
    )
    return parser
