"""Parsers of the tools, and the arguments of all benchmarks: `--only`, `--out` and `--peers`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path


def tool_parser(module: str, description: str | None, epilog: str) -> argparse.ArgumentParser:
    """A parser without arguments for `python -m MODULE`; keeps the layout of its texts."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def benchmark_parser(
    module: str, description: str | None, examples: str, *, out: str, unit: str, peers: str
) -> argparse.ArgumentParser:
    """A parser with the arguments that all benchmarks have.

    Args:
        module: The module that `python -m` runs.
        description: What it measures.
        examples: Printed after the arguments.
        out: Default of `--out`.
        unit: What `--only` selects, such as `shape`.
        peers: What the folders of `--peers` contain.
    """
    parser = tool_parser(module, description, examples)
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar=unit.upper(),
        help=f"run this {unit} (repeatable; default: all)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(out), help="JSON report (default: %(default)s)"
    )
    parser.add_argument(
        "--peers",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help=f"folder with {peers} (made by pip install --target); repeatable",
    )
    return parser


def unknown_name(only: Sequence[str], names: Collection[str], unit: str) -> str:
    """What is wrong with the names of `--only`; empty if they are known."""
    unknown = [name for name in only if name not in names]
    if not unknown:
        return ""
    return f"--only {unknown[0]}: unknown {unit}; expected one of {', '.join(names)}"


def print_error(problem: str) -> int:
    """Print an invalid option to stderr; returns the exit status."""
    print(f"error: {problem}", file=sys.stderr)
    return 2


def import_peers(folders: Sequence[Path]) -> None:
    """Make packages in these folders importable; installed versions take precedence."""
    sys.path += map(str, folders)
