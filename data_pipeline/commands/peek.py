"""`vlmoe data peek`: look at samples, as text or as a sheet of pictures."""

from __future__ import annotations

import argparse
import io

from data_pipeline.commands.options import add_caption_keys, add_datasets
from data_pipeline.common.commands import Subparsers, add_command
from data_pipeline.common.errors import ConfigError

_EXAMPLES = """\
  vlmoe data peek shards/
  vlmoe data peek shards/ --random 60 --seed 1 --out sheet.html
  vlmoe data peek shards/ --key 000123
  vlmoe data peek s3://bucket/pairs --shard shard-000007.tar --index 41

Of a store, only the samples that are shown are asked for. Control characters in texts are spelt out."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    peek = add_command(
        subparsers,
        "peek",
        summary="show samples, in the terminal or as a sheet of pictures",
        examples=_EXAMPLES,
        description="Show the files, picture and captions of some samples.",
    )
    add_datasets(peek)
    peek.add_argument(
        "--shard",
        metavar="NAME|N",
        default="",
        help="of this shard: its name, or its number from 0",
    )
    which = peek.add_mutually_exclusive_group()
    which.add_argument("--key", metavar="KEY", default="", help="the sample of this key")
    which.add_argument(
        "--index", metavar="N", type=int, default=None, help="the sample of this number, from 0"
    )
    which.add_argument("--random", metavar="N", type=int, default=0, help="so many drawn at random")
    which.add_argument(
        "--first", metavar="N", type=int, default=5, help="the first ones (default: 5)"
    )
    peek.add_argument("--seed", metavar="N", type=int, default=0, help="of --random (default: 0)")
    add_caption_keys(peek)
    peek.add_argument(
        "--out", metavar="FILE", default="", help="write a sheet instead: .html or .png"
    )
    peek.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> None:
    """Show them."""
    from data_pipeline.common import storage
    from data_pipeline.preparing.choose import Choice, choose_samples
    from data_pipeline.preparing.page import page, row_of
    from data_pipeline.preparing.show import contact_sheet, read_samples, sample_card, sample_text
    from data_pipeline.preparing.visit import open_datasets

    if args.out and not args.out.endswith((".html", ".png")):
        raise ConfigError(f"--out {args.out}: a sheet ends in .html or .png")
    keys = args.caption_key or ["txt"]
    choice = Choice(
        shard=args.shard,
        key=args.key,
        index=args.index,
        random=args.random,
        seed=args.seed,
        count=args.first,
    )
    shown = [
        (f"{task.entry.name} #{number}", raw)
        for task, number, raw in read_samples(choose_samples(open_datasets(args.datasets), choice))
    ]
    if not args.out:
        print("\n\n".join(sample_text(raw, keys, where) for where, raw in shown))
        return
    if args.out.endswith(".html"):
        data = page(
            f"{len(shown)} samples",
            [row_of([sample_card(raw, keys, where) for where, raw in shown])],
        )
    else:
        buffer = io.BytesIO()
        contact_sheet(shown, keys).save(buffer, "PNG")
        data = buffer.getvalue()
    storage.write_bytes(args.out, data)
    print(f"{storage.redact(args.out)}: {len(shown)} samples")
