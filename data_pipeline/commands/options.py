"""Options that several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from data_pipeline.common.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from data_pipeline.preparing.visit import Unread

_NAMED_SHARDS = 20


def add_datasets(parser: argparse.ArgumentParser) -> None:
    """The datasets that a command reads."""
    parser.add_argument(
        "datasets",
        metavar="DATASET",
        nargs="+",
        help="a folder with a manifest.json, or that file; local or in a store; braces may be used",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Processes."""
    parser.add_argument(
        "--workers",
        metavar="N",
        type=int,
        default=None,
        help="processes (default: one a CPU; 0: no others)",
    )


def add_parts(parser: argparse.ArgumentParser, *, work: bool = True) -> None:
    """Shares of the work, for job arrays."""
    parser.add_argument(
        "--part",
        metavar="I/N",
        default="0/1",
        help="only share I (from 0) of N; afterwards the same line without --part ends the work",
    )
    if work:
        parser.add_argument(
            "--work",
            metavar="FOLDER",
            default="",
            help="where each shard's result is kept: a second call goes on, and parts meet",
        )


def add_caption_keys(parser: argparse.ArgumentParser) -> None:
    """Where captions are."""
    parser.add_argument(
        "--caption-key",
        metavar="KEY",
        action="append",
        default=None,
        help="where captions are: txt, or json:FIELD; may be repeated (default: txt)",
    )


def workers_of(args: argparse.Namespace) -> int:
    """Processes to use.

    Raises:
        ConfigError: Fewer than none.
    """
    from data_pipeline.common.processes import usable_cpus

    if args.workers is None:
        return usable_cpus()
    if args.workers < 0:
        raise ConfigError(f"--workers {args.workers}: must be 0 or more")
    return int(args.workers)


def report_unread(unread: Sequence[Unread]) -> int:
    """Name the shards that could not be had.

    Returns:
        The exit status: 1 if there are any.
    """
    from data_pipeline.common.harmless import harmless
    from data_pipeline.common.storage import redact

    for row in unread[:_NAMED_SHARDS]:
        where = f"{redact(row.task.manifest.base)}: {row.task.entry.name}"
        print(f"  not looked at: {harmless(where)}: {row.reason}: {harmless(row.detail)}")
    if len(unread) > _NAMED_SHARDS:
        print(f"  and {len(unread) - _NAMED_SHARDS:,} more")
    if unread:
        print(
            f"{len(unread):,} shards could not be had, so no sample of them is counted or dropped; mend what is "
            f"named above and call the same line again (with --work, it asks for these alone)"
        )
    return 1 if unread else 0
