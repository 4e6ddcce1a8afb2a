"""Options that several commands share."""

from __future__ import annotations

import argparse

from data_pipeline.common.errors import ConfigError


def add_datasets(parser: argparse.ArgumentParser) -> None:
    """The datasets that a command reads."""
    parser.add_argument("datasets", metavar="DATASET", nargs="+",
                        help="a folder with a manifest.json, or that file; local or in a store; braces may be used")


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Processes."""
    parser.add_argument("--workers", metavar="N", type=int, default=None,
                        help="processes (default: one a CPU; 0: no others)")


def add_parts(parser: argparse.ArgumentParser, *, work: bool = True) -> None:
    """Shares of the work, for job arrays."""
    parser.add_argument("--part", metavar="I/N", default="0/1",
                        help="only share I (from 0) of N; afterwards the same line without --part ends the work")
    if work:
        parser.add_argument("--work", metavar="FOLDER", default="",
                            help="where each shard's result is kept: a second call goes on, and parts meet")


def add_caption_keys(parser: argparse.ArgumentParser) -> None:
    """Where captions are."""
    parser.add_argument("--caption-key", metavar="KEY", action="append", default=None,
                        help="where captions are: txt, or json:FIELD; may be repeated (default: txt)")


def workers_of(args: argparse.Namespace) -> int:
    """Processes to use.

    Raises:
        ConfigError: Fewer than none.
    """
    from data_pipeline.preparing.processes import default_workers

    if args.workers is None:
        return default_workers()
    if args.workers < 0:
        raise ConfigError(f"--workers {args.workers}: must be 0 or more")
    return int(args.workers)
