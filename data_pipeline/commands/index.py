"""`vlmoe data index`: the manifest of shards that are there."""

from __future__ import annotations

import argparse

from data_pipeline.common.commands import Subparsers, add_command

_INDEX_EXAMPLES = """\
  vlmoe data index shards/*.tar
  vlmoe data index shards/
  vlmoe data index 's3://bucket/pairs/train-{000..127}.tar'

The manifest names each shard with its samples, bytes and SHA-256, and stands beside the shards with
one index file a shard: the place, sizes and CRC-32 of each sample. Training reads shards through it."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    index = add_command(
        subparsers, "index", summary="write the manifest of WebDataset shards", examples=_INDEX_EXAMPLES,
        description="Read every shard once, strictly, and write what training needs to know about it. The "
                    "shards themselves are not changed.",
    )
    index.add_argument("shards", metavar="SHARD", nargs="+",
                       help="a folder, or tar files: paths, wildcards, or addresses with braces")
    index.add_argument("--out", metavar="FOLDER", default="",
                       help="the manifest's folder (default: the one that holds all the shards)")
    index.set_defaults(handle=handle_index)


def handle_index(args: argparse.Namespace) -> None:
    """Index the shards and say what was found."""
    from data_pipeline.common.storage import join, redact
    from data_pipeline.shards.indexing import index_shards
    from data_pipeline.shards.manifest import MANIFEST_NAME

    manifest = index_shards(args.shards, args.out)
    print(f"{redact(join(manifest.url, MANIFEST_NAME))}: {len(manifest.shards):,} shards, "
          f"{manifest.total_samples:,} samples")
