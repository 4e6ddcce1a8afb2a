"""Command-line options shared by several commands."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.tables import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from data_pipeline.preparing.shard_map import UnavailableShard
    from data_pipeline.sample_keys import SampleKeys

_MAX_LISTED = 20


def add_datasets(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument for datasets."""
    parser.add_argument(
        "datasets",
        metavar="DATASET",
        nargs="+",
        help="folder with a manifest.json, that file, or shards without one (tar files, folder, "
        "wildcards, @FILE); local or in an object store; braces are expanded",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add `--workers`."""
    parser.add_argument(
        "--workers",
        metavar="N",
        type=int,
        default=None,
        help="number of processes (default: one per CPU; 0: no worker processes)",
    )


def add_parts(parser: argparse.ArgumentParser, *, work_dir: bool = True) -> None:
    """Add `--part`, and `--work-dir` for commands that store results per shard."""
    parser.add_argument(
        "--part",
        metavar="I/N",
        default="0/1",
        help="process only part I (from 0) of N; run without --part afterwards to combine the "
        "results",
    )
    if work_dir:
        parser.add_argument(
            "--work-dir",
            metavar="FOLDER",
            default="",
            help="folder for the results of each shard, to resume a run and to combine parts",
        )


def add_sample_keys(parser: argparse.ArgumentParser) -> None:
    """Add `--caption-key` and `--image-key`."""
    add_caption_keys(parser)
    parser.add_argument(
        "--image-key",
        metavar="EXT",
        action="append",
        default=None,
        help="extension of the image file, such as jpg or left.png; may be repeated (default: all "
        "image formats)",
    )


def sample_keys(args: argparse.Namespace) -> SampleKeys:
    """The keys of `add_sample_keys`.

    Raises:
        ConfigError: An image key is not an extension.
    """
    from data_pipeline.sample_keys import DEFAULT_KEYS, SampleKeys, check_image_keys

    images = tuple(args.image_key or DEFAULT_KEYS.images)
    check_image_keys(images)
    return SampleKeys(images, tuple(args.caption_key or DEFAULT_KEYS.captions))


def add_caption_keys(parser: argparse.ArgumentParser) -> None:
    """Add `--caption-key`."""
    parser.add_argument(
        "--caption-key",
        metavar="KEY",
        action="append",
        default=None,
        help="where to find captions: txt, or json:FIELD; may be repeated (default: txt)",
    )


def workers_of(args: argparse.Namespace) -> int:
    """The number of processes to use.

    Raises:
        ConfigError: The number is negative.
    """
    from data_pipeline.common.processes import usable_cpus

    if args.workers is None:
        return usable_cpus()
    if args.workers < 0:
        raise ConfigError(f"--workers {args.workers}: must be 0 or more")
    return int(args.workers)


def report_unavailable(shards: Sequence[UnavailableShard]) -> int:
    """Print the shards that could not be read.

    Returns:
        The exit status: 1 if there are any.
    """
    from data_pipeline.common.escaping import escape_control
    from data_pipeline.common.storage import redact

    for row in shards[:_MAX_LISTED]:
        location = escape_control(f"{redact(row.task.manifest.base)}: {row.task.entry.name}")
        print(f"  unavailable: {location}: {row.reason}: {escape_control(row.detail)}")
    if len(shards) > _MAX_LISTED:
        print(f"  and {len(shards) - _MAX_LISTED:,} more")
    if shards:
        print(
            f"{counted(len(shards), 'shard')} unavailable, whose samples are neither counted nor "
            f"dropped. Fix the problems listed above and run the same command again (with "
            f"--work-dir, it reads only these shards)"
        )
    return 1 if shards else 0


def shown(address: str) -> str:
    """An address to print: without secrets, with escaped control characters."""
    from data_pipeline.common.escaping import escape_control
    from data_pipeline.common.storage import redact

    return escape_control(redact(address))
