"""`vlmoe data check`: is every sample what the manifest says?"""

from __future__ import annotations

import argparse
import json

from data_pipeline.commands.options import (
    add_caption_keys,
    add_datasets,
    add_parts,
    add_workers,
    report_unread,
    workers_of,
)
from data_pipeline.common.commands import Subparsers, add_command

_EXAMPLES = """\
  vlmoe data check shards/
  vlmoe data check s3://bucket/pairs --decode --drop-list bad.json
  vlmoe data check 's3://bucket/{cc3m,coco}' --workers 16 --json report.json

Compares the length and SHA-256 of every shard, its index, and the CRC-32 of every sample; --decode also reads
every picture and caption. The exit status is 1 if anything is wrong. With the drop-list as a source's `drop`,
training never reads what is bad. Shards that cannot be had are named, and do not enter the drop-list."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    check = add_command(
        subparsers,
        "check",
        summary="compare every sample with the manifest, and decode it",
        examples=_EXAMPLES,
        description="Look at every sample of datasets, and list what is damaged or missing.",
    )
    add_datasets(check)
    check.add_argument(
        "--decode", action="store_true", help="decode pictures and read captions too"
    )
    add_caption_keys(check)
    check.add_argument(
        "--first", metavar="N", type=int, default=10, help="bad samples to name (default: 10)"
    )
    check.add_argument("--json", metavar="FILE", default="", help="write all findings as JSON")
    check.add_argument(
        "--drop-list", metavar="FILE", default="", help="write a drop-list of the bad samples"
    )
    add_workers(check)
    add_parts(check)
    check.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> int:
    """Check, and print a table."""
    from data_pipeline.common import storage
    from data_pipeline.common.harmless import harmless
    from data_pipeline.common.processes import WHOLE, parse_part
    from data_pipeline.preparing.check import check, where_of
    from data_pipeline.preparing.drop_lists import write_drop_lists
    from data_pipeline.preparing.tables import shortened, table
    from data_pipeline.preparing.visit import need_work_for, open_datasets

    part = parse_part(args.part)
    need_work_for(part, args.work)
    manifests = open_datasets(args.datasets)
    done = check(
        manifests,
        contents=args.decode,
        caption_keys=args.caption_key or ["txt"],
        workers=workers_of(args),
        part=part,
        work=args.work,
    )
    seen = f"{done.samples:,} samples of {done.shards:,} shards"
    if part != WHOLE:
        print(
            f"part {args.part}: {seen}, {len(done.findings):,} findings; the same line without --part reports all"
        )
        return report_unread(done.unread)
    if done.findings:
        print(f"{seen}:\n" + table(["wrong", "samples", "shards"], done.reasons()))
        named = [
            found for found in done.findings if found.detail
        ]  # not each sample of a missing shard
        for found in named[: args.first]:
            print(
                f"  {harmless(where_of(found))}: {found.reason}: {shortened(harmless(found.detail), 200)}"
            )
        if len(named) > args.first:
            print(
                f"  and {len(named) - args.first:,} more"
                + ("" if args.json else "; --json FILE lists all")
            )
    else:
        print(
            f"{seen}: all as the manifest says"
            + (", pictures and captions readable" if args.decode else "")
        )
    if args.json:
        rows = [found._asdict() for found in done.findings]
        content = {"samples": done.samples, "shards": done.shards, "findings": rows}
        storage.write_bytes(args.json, json.dumps(content, indent=1).encode())
    if args.drop_list:
        about = {"made by": "vlmoe data check" + (" --decode" if args.decode else "")}
        bad = [done.bad(number) for number in range(len(manifests))]
        print("\n".join(write_drop_lists(args.drop_list, manifests, bad, about)))
    report_unread(done.unread)
    return 1 if done.findings else 0
