"""`vlmoe data index`: writes the manifest of existing shards."""

from __future__ import annotations

import argparse

from data_pipeline.commands.options import add_parts, add_workers, shown, workers_of
from data_pipeline.common.commands import Subparsers, add_command
from data_pipeline.common.tables import counted

_EXAMPLES = """\
  vlmoe data index shards/
  vlmoe data index 's3://bucket/pairs/train-{000..127}.tar'
  vlmoe data index 's3://bucket/pairs/**' --workers 16
  vlmoe data index s3://read-only/pairs --out /data/indices/pairs
  vlmoe data index @shards.txt --out /data/indices --part 3/8          one task of a job array

The manifest lists the samples, bytes and SHA-256 of each shard. It is written next to the shards,
with one index file per shard: the offset, members and CRC-32 of each sample. Training reads shards
through them. Shards written by img2dataset, open_clip, webdataset and GNU tar are supported. Other
files beside the shards are counted by their extension; compressed archives are named in a warning.

Refused are samples with links or sparse files, and compressed archives: their samples cannot be
read in one piece. Files without a sample (hidden files, folders, names without an extension) are
counted and ignored.

The command is resumable: run the same command again to continue after an interruption; only new or
changed shards are read. After the tasks of a job array, run it without --part to write the
manifest."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    index = add_command(
        subparsers,
        "index",
        summary="write the manifest of WebDataset shards",
        examples=_EXAMPLES,
        description="Read and validate every shard once, and write the metadata that training "
        "needs.\nThe shards are not changed.",
    )
    index.add_argument(
        "shards",
        metavar="SHARD",
        nargs="+",
        help="folders or tar files, local or in an object store, with braces or wildcards; or "
        "@FILE, a list of them",
    )
    index.add_argument(
        "--out",
        metavar="FOLDER",
        default="",
        help="folder of the manifest and the indices (default: the common folder of the shards)",
    )
    index.add_argument(
        "--salvage",
        action="store_true",
        help="keep the readable samples of corrupt shards; the manifest lists what is lost",
    )
    add_workers(index)
    add_parts(index, work_dir=False)
    index.set_defaults(handle=handle_index)


def handle_index(args: argparse.Namespace) -> None:
    """Index the shards and print a summary."""
    from data_pipeline.common.processes import SINGLE_PART, parse_part
    from data_pipeline.common.storage import join
    from data_pipeline.shards.indexing import index_shards
    from data_pipeline.shards.manifest import MANIFEST_NAME

    part = parse_part(args.part)
    manifest = index_shards(
        args.shards, args.out, workers=workers_of(args), part=part, salvage=args.salvage
    )

    summary = (
        f"{counted(len(manifest.shards), 'shard')}, {counted(manifest.total_samples, 'sample')}"
    )
    corrupt = sum(bool(shard.corruption) for shard in manifest.shards)
    if corrupt:
        summary += f"; {counted(corrupt, 'corrupt shard')}, see `corruption` in the manifest"
    if part == SINGLE_PART:
        print(f"{shown(join(manifest.url, MANIFEST_NAME))}: {summary}")
    else:
        index, count = part
        print(
            f"part {index} of {count} is indexed: {summary}; when all parts are done, run without "
            f"--part"
        )
