"""`vlmoe data dedup`: the same picture, nearly the same picture, the same caption."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from data_pipeline.commands.options import (
    add_caption_keys,
    add_datasets,
    add_parts,
    add_workers,
    report_unread,
    workers_of,
)
from data_pipeline.common.commands import Subparsers, add_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from data_pipeline.preparing.dedup import Groups
    from data_pipeline.preparing.hashing import Hashes
    from data_pipeline.shards.manifest import Manifest

_EXAMPLES = """\
  vlmoe data dedup shards/ --drop-list drop.json --html groups.html
  vlmoe data dedup shards/ --by pair --distance 5 --work hashes/
  vlmoe data dedup train/ --against held-out/ --drop-list leaked.json

--by exact: the same file; near: that, or perceptual hashes of 64 bits that differ in --distance bits at most;
caption: the same caption whatever its capitals and blanks; pair: near, and the same caption. The first sample of
each group is kept. Samples of --against are kept always, and what is like them is dropped. Give the drop-list to
training as a source's `drop`. The exit status is 1 if a shard could not be had."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    dedup = add_command(
        subparsers,
        "dedup",
        summary="find samples that come more than once, and drop them",
        examples=_EXAMPLES,
        description="Compare the pictures and captions of all samples, within and across datasets.",
    )
    add_datasets(dedup)
    dedup.add_argument(
        "--against",
        metavar="DATASET",
        action="append",
        default=[],
        help="a dataset to compare with that loses nothing, such as held-out data; may be repeated",
    )
    dedup.add_argument(
        "--by",
        choices=("exact", "near", "caption", "pair"),
        default="near",
        help="what makes two samples alike (default: near)",
    )
    dedup.add_argument(
        "--distance",
        metavar="BITS",
        type=int,
        default=3,
        help="most bits in which nearly equal pictures differ, 0 to 15 (default: 3)",
    )
    add_caption_keys(dedup)
    dedup.add_argument(
        "--drop-list", metavar="FILE", default="", help="write a drop-list of all but the first"
    )
    dedup.add_argument("--json", metavar="FILE", default="", help="write the groups as JSON")
    dedup.add_argument(
        "--html", metavar="FILE", default="", help="write a page that shows the largest groups"
    )
    dedup.add_argument(
        "--groups", metavar="N", type=int, default=50, help="groups on the page (default: 50)"
    )
    add_workers(dedup)
    add_parts(dedup)
    dedup.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> int:
    """Compare, and say what comes more than once."""
    from data_pipeline.common import storage
    from data_pipeline.common.processes import WHOLE, parse_part
    from data_pipeline.preparing.dedup import KINDS, drops, find_groups
    from data_pipeline.preparing.drop_lists import write_drop_lists
    from data_pipeline.preparing.hashing import READABLE, hash_samples
    from data_pipeline.preparing.tables import table
    from data_pipeline.preparing.visit import need_work_for, open_datasets

    part, keys = parse_part(args.part), args.caption_key or ["txt"]
    need_work_for(part, args.work)
    against, given = open_datasets(args.against), open_datasets(args.datasets)
    manifests = [*against, *given]
    hashes = hash_samples(
        manifests, caption_keys=keys, workers=workers_of(args), part=part, work=args.work
    )
    if part != WHOLE:
        print(
            f"part {args.part}: {len(hashes):,} samples hashed; the same line without --part compares all"
        )
        return report_unread(hashes.unread)
    found = {
        kind: find_groups(hashes, kind, distance=args.distance, against=len(against))
        for kind in KINDS
    }
    rows = [(kind, *_counts(found[kind])) for kind in KINDS]
    unreadable = int((~hashes.has(READABLE)).sum())
    print(
        f"{len(hashes):,} samples"
        + (f", {unreadable:,} of them unreadable and left alone" if unreadable else "")
    )
    print(table(["alike by", "groups", "largest", "to drop"], rows))
    chosen = found[args.by]
    about = {"made by": f"vlmoe data dedup --by {args.by} --distance {args.distance}"}
    if args.drop_list:
        dropped = [drops(hashes, chosen, len(against) + number) for number in range(len(given))]
        print("\n".join(write_drop_lists(args.drop_list, given, dropped, about)))
    if args.json:
        content = about | {"groups": _groups(hashes, chosen, manifests)}
        storage.write_bytes(args.json, json.dumps(content, indent=1).encode())
    if args.html:
        title = f"{len(chosen.members()):,} groups of samples that are alike by {args.by}"
        storage.write_bytes(args.html, _page(title, hashes, chosen, manifests, keys, args.groups))
        print(storage.redact(args.html))
    return report_unread(hashes.unread)


def _counts(groups: Groups) -> tuple[int, int, int]:
    members = groups.members()
    return len(members), max(map(len, members), default=0), len(groups.dropped)


def _groups(
    hashes: Hashes, groups: Groups, manifests: Sequence[Manifest]
) -> list[list[dict[str, Any]]]:
    """All groups, the kept sample first."""
    from data_pipeline.common.storage import redact
    from data_pipeline.preparing.dedup import where

    def row(number: int) -> dict[str, Any]:
        place = where(hashes, number)
        manifest = manifests[place.dataset]
        return {
            "dataset": redact(manifest.url),
            "shard": manifest.shards[place.shard].name,
            "sample": place.sample,
        }

    return [[row(number) for number in members] for members in groups.members()]


def _page(
    title: str,
    hashes: Hashes,
    groups: Groups,
    manifests: Sequence[Manifest],
    keys: Sequence[str],
    limit: int,
) -> bytes:
    """The largest groups, up to eight samples of each."""
    from data_pipeline.preparing.dedup import where
    from data_pipeline.preparing.page import page, paragraph, row_of
    from data_pipeline.preparing.show import read_places, sample_card

    shown = groups.members()[:limit]
    places = {number: where(hashes, number) for members in shown for number in members[:8]}
    raws = read_places(manifests, list(places.values()))
    parts = [paragraph("The first of each group is kept.")]
    for members in shown:
        cards = [
            sample_card(
                raws[place],
                keys,
                f"{manifests[place.dataset].shards[place.shard].name} #{place.sample}",
            )
            for place in (places[number] for number in members[:8])
        ]
        more = paragraph(f"and {len(members) - 8:,} more") if len(members) > 8 else ""
        parts.append(f'<div class="group">{row_of(cards)}{more}</div>')
    return page(title, parts)
