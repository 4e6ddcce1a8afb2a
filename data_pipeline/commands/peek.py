"""`vlmoe data peek`: shows samples as text, as an HTML page or as a contact sheet."""

from __future__ import annotations

import argparse
import io

from data_pipeline.commands.options import add_datasets, add_sample_keys, sample_keys, shown
from data_pipeline.common.commands import Subparsers, add_command
from data_pipeline.common.errors import ConfigError
from data_pipeline.common.tables import counted

_EXAMPLES = """\
  vlmoe data peek shards/
  vlmoe data peek shards/ --random 60 --seed 1 --out sheet.html
  vlmoe data peek shards/ --key 000123
  vlmoe data peek s3://bucket/pairs --shard shard-000007.tar --index 41

From an object store, only the selected samples are read. Control characters in text are escaped."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    peek = add_command(
        subparsers,
        "peek",
        summary="show samples, in the terminal or as an HTML or PNG sheet",
        examples=_EXAMPLES,
        description="Show the files, image and captions of some samples.",
    )
    add_datasets(peek)
    peek.add_argument(
        "--shard",
        metavar="NAME|N",
        default="",
        help="only this shard: its name, or its index from 0",
    )
    selection = peek.add_mutually_exclusive_group()
    selection.add_argument("--key", metavar="KEY", default="", help="the sample with this key")
    selection.add_argument(
        "--index", metavar="N", type=int, default=None, help="the sample with this index, from 0"
    )
    selection.add_argument(
        "--random", metavar="N", type=int, default=0, help="this number of random samples"
    )
    selection.add_argument(
        "--first",
        metavar="N",
        type=int,
        default=5,
        help="this number of first samples (default: 5)",
    )
    peek.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed of --random (default: 0)"
    )
    add_sample_keys(peek)
    peek.add_argument(
        "--image-mode",
        choices=("crop", "pad", "squash"),
        default=None,
        help="with --out: show images as the model's square input with this data.image_mode",
    )
    peek.add_argument(
        "--out",
        metavar="FILE",
        default="",
        help="write a contact sheet (.html or .png)",
    )
    peek.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> None:
    """Print the samples, or write a sheet."""
    from data_pipeline.common import storage
    from data_pipeline.preparing.html_report import flex_row, html_page
    from data_pipeline.preparing.sample_views import (
        contact_sheet,
        read_tasks,
        sample_card,
        sample_text,
    )
    from data_pipeline.preparing.selection import SampleSelection, select_samples
    from data_pipeline.preparing.tasks import open_datasets

    if args.out and not args.out.endswith((".html", ".png")):
        raise ConfigError(f"--out {args.out}: the file name must end in .html or .png")

    keys = sample_keys(args)
    selection = SampleSelection(
        shard=args.shard,
        key=args.key,
        index=args.index,
        random=args.random,
        seed=args.seed,
        count=args.first,
    )
    tasks = select_samples(open_datasets(args.datasets), selection)
    samples = [(f"{task.entry.name} #{index}", raw) for task, index, raw in read_tasks(tasks)]
    if not args.out:
        print("\n\n".join(sample_text(raw, keys, location) for location, raw in samples))
        return

    if args.out.endswith(".html"):
        cards = [sample_card(raw, keys, location, args.image_mode) for location, raw in samples]
        data = html_page(counted(len(samples), "sample"), [flex_row(cards)])
    else:
        buffer = io.BytesIO()
        contact_sheet(samples, keys, args.image_mode).save(buffer, "PNG")
        data = buffer.getvalue()
    storage.write_bytes(args.out, data)
    print(f"{shown(args.out)}: {counted(len(samples), 'sample')}")
