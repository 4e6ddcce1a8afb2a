"""`vlmoe data index`: the manifest of shards that are there."""

from __future__ import annotations

import argparse

from data_pipeline.commands.options import add_parts, add_workers, workers_of
from data_pipeline.common.commands import Subparsers, add_command

_INDEX_EXAMPLES = """\
  vlmoe data index shards/
  vlmoe data index 's3://bucket/pairs/train-{000..127}.tar'
  vlmoe data index 's3://bucket/pairs/**' --workers 16
  vlmoe data index s3://read-only/pairs --out /data/indices/pairs
  vlmoe data index @shards.txt --out /data/indices --part 3/8          one task of a job array

The manifest names each shard with its samples, bytes and SHA-256, and stands beside the shards with
one index file a shard: the place, files and CRC-32 of each sample. Training reads shards through it.
Shards of img2dataset, open_clip, webdataset and GNU tar will do. Other files beside them are passed over.

What was done is kept: the same line again goes on where it was stopped, and reads only new or changed
shards. After the tasks of a job array, the same line without --part writes the manifest."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    index = add_command(
        subparsers,
        "index",
        summary="write the manifest of WebDataset shards",
        examples=_INDEX_EXAMPLES,
        description="Read every shard once, strictly, and write what training needs to know about it. The "
        "shards themselves are not changed.",
    )
    index.add_argument(
        "shards",
        metavar="SHARD",
        nargs="+",
        help="folders or tar files, local or in a store, with braces or wildcards; or @FILE, a list "
        "of them",
    )
    index.add_argument(
        "--out",
        metavar="FOLDER",
        default="",
        help="folder of the manifest and the indices (default: the one that holds all the shards)",
    )
    index.add_argument(
        "--salvage",
        action="store_true",
        help="keep what can be read of damaged shards; the manifest says what is lost",
    )
    add_workers(index)
    add_parts(index, work=False)
    index.set_defaults(handle=handle_index)


def handle_index(args: argparse.Namespace) -> None:
    """Index the shards and say what was found."""
    from data_pipeline.common.processes import WHOLE, parse_part
    from data_pipeline.common.storage import join, redact
    from data_pipeline.shards.indexing import index_shards
    from data_pipeline.shards.manifest import MANIFEST_NAME

    part = parse_part(args.part)
    manifest = index_shards(
        args.shards, args.out, workers=workers_of(args), part=part, salvage=args.salvage
    )
    counts = f"{len(manifest.shards):,} shards, {manifest.total_samples:,} samples"
    damaged = sum(bool(shard.damage) for shard in manifest.shards)
    lost = f"; {damaged:,} shards are damaged, see `damage` in the manifest" if damaged else ""
    if part == WHOLE:
        print(f"{redact(join(manifest.url, MANIFEST_NAME))}: {counts}{lost}")
    else:
        print(
            f"part {part[0]} of {part[1]} is indexed: {counts}{lost}; when all parts are, call this without --part"
        )
