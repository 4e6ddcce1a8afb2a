"""`vlmoe data dedup`: finds duplicate images, near-duplicate images and duplicate captions."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from data_pipeline.commands.options import (
    add_datasets,
    add_parts,
    add_sample_keys,
    add_workers,
    report_unavailable,
    sample_keys,
    shown,
    workers_of,
)
from data_pipeline.common.commands import Subparsers, add_command
from data_pipeline.common.json_file import write_json
from data_pipeline.common.tables import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from data_pipeline.preparing.dedup import Groups
    from data_pipeline.preparing.sample_hashes import Hashes
    from data_pipeline.shards.manifest import Manifest

_EXAMPLES = """\
  vlmoe data dedup shards/ --drop-list drop.json --html groups.html
  vlmoe data dedup shards/ --by pair --distance 5 --work-dir hashes/
  vlmoe data dedup train/ --against held-out/ --drop-list leaked.json

--by exact: equal image files; near: equal files, or 64-bit perceptual hashes that differ in at most
--distance bits; caption: equal captions, ignoring case and whitespace; pair: near, and equal
captions. The first sample of each group is kept. Samples of --against are always kept, and their
duplicates are dropped. For training, set `drop` of the data.train source to the drop-list. The exit
status is 1 if a shard is unavailable."""

_MAX_SHOWN = 8
"""Maximum number of samples of a group on the HTML page."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    dedup = add_command(
        subparsers,
        "dedup",
        summary="find duplicate samples, and write a drop-list",
        examples=_EXAMPLES,
        description="Compare the images and captions of all samples, within and across datasets.",
    )
    add_datasets(dedup)
    dedup.add_argument(
        "--against",
        metavar="DATASET",
        action="append",
        default=[],
        help="compare with this dataset, such as held-out data, but keep all its samples; may be "
        "repeated",
    )
    dedup.add_argument(
        "--by",
        choices=("exact", "near", "caption", "pair"),
        default="near",
        help="criterion for duplicates (default: near)",
    )
    dedup.add_argument(
        "--distance",
        metavar="BITS",
        type=int,
        default=3,
        help="maximum Hamming distance of near-duplicate images, 0 to 15 (default: 3)",
    )
    add_sample_keys(dedup)
    dedup.add_argument(
        "--drop-list", metavar="FILE", default="", help="write a drop-list of all but the first"
    )
    dedup.add_argument("--json", metavar="FILE", default="", help="write the groups as JSON")
    dedup.add_argument(
        "--html", metavar="FILE", default="", help="write an HTML page with the largest groups"
    )
    dedup.add_argument(
        "--groups", metavar="N", type=int, default=50, help="groups on the page (default: 50)"
    )
    add_workers(dedup)
    add_parts(dedup)
    dedup.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> int:
    """Find duplicates and print a table."""
    from data_pipeline.common.processes import SINGLE_PART, parse_part
    from data_pipeline.preparing.dedup import CRITERIA, find_groups
    from data_pipeline.preparing.sample_hashes import hash_samples
    from data_pipeline.preparing.shard_map import require_work_dir
    from data_pipeline.preparing.tasks import open_datasets

    part = parse_part(args.part)
    require_work_dir(part, args.work_dir)
    against, datasets = open_datasets(args.against), open_datasets(args.datasets)
    manifests = [*against, *datasets]
    hashes = hash_samples(
        manifests,
        keys=sample_keys(args),
        workers=workers_of(args),
        part=part,
        work_dir=args.work_dir,
    )
    if part != SINGLE_PART:
        print(
            f"part {args.part}: {counted(len(hashes), 'sample')} hashed; run without --part to "
            f"compare all"
        )
        return report_unavailable(hashes.unavailable)

    groups = {
        criterion: find_groups(hashes, criterion, distance=args.distance, against=len(against))
        for criterion in CRITERIA
    }
    _print_counts(hashes, groups)
    _write_files(args, hashes, groups[args.by], manifests, len(against))
    return report_unavailable(hashes.unavailable)


def _print_counts(hashes: Hashes, groups: dict[Any, Groups]) -> None:
    from data_pipeline.common.tables import format_table
    from data_pipeline.preparing.sample_hashes import READABLE

    unreadable = int((~hashes.has(READABLE)).sum())
    ignored = f", {unreadable:,} of them unreadable and ignored" if unreadable else ""
    print(f"{counted(len(hashes), 'sample')}{ignored}")

    rows = []
    for criterion, result in groups.items():
        members = result.members()
        largest = max(map(len, members), default=0)
        rows.append((criterion, len(members), largest, len(result.dropped)))
    print(format_table(["criterion", "groups", "largest", "to drop"], rows))


def _write_files(
    args: argparse.Namespace,
    hashes: Hashes,
    groups: Groups,
    manifests: Sequence[Manifest],
    num_against: int,
) -> None:
    """Write the requested drop-list, JSON file and HTML page."""
    from data_pipeline.common import storage
    from data_pipeline.preparing.dedup import dropped_samples
    from data_pipeline.preparing.drop_lists import write_drop_lists

    about = {"made by": f"vlmoe data dedup --by {args.by} --distance {args.distance}"}
    if args.drop_list:
        indices = range(num_against, len(manifests))
        dropped = [dropped_samples(hashes, groups, index) for index in indices]
        datasets = manifests[num_against:]
        print("\n".join(write_drop_lists(args.drop_list, datasets, dropped, about)))
    if args.json:
        content = about | {"groups": _groups_json(hashes, groups, manifests)}
        write_json(args.json, content)
    if args.html:
        storage.write_bytes(args.html, _html(args, hashes, groups, manifests))
        print(shown(args.html))


def _groups_json(
    hashes: Hashes, groups: Groups, manifests: Sequence[Manifest]
) -> list[list[dict[str, Any]]]:
    """The samples of all groups, the kept sample first."""
    from data_pipeline.common.storage import redact
    from data_pipeline.preparing.dedup import sample_location

    def sample(row: int) -> dict[str, Any]:
        location = sample_location(hashes, row)
        manifest = manifests[location.dataset]
        return {
            "dataset": redact(manifest.url),
            "shard": manifest.shards[location.shard].name,
            "sample": location.sample,
        }

    return [[sample(row) for row in members] for members in groups.members()]


def _html(
    args: argparse.Namespace, hashes: Hashes, groups: Groups, manifests: Sequence[Manifest]
) -> bytes:
    """HTML page of the largest groups, with up to `_MAX_SHOWN` samples of each."""
    from data_pipeline.preparing.dedup import sample_location
    from data_pipeline.preparing.html_report import flex_row, html_page, paragraph
    from data_pipeline.preparing.sample_views import read_samples_at, sample_card

    members = groups.members()
    shown = [
        [sample_location(hashes, row) for row in rows[:_MAX_SHOWN]]
        for rows in members[: args.groups]
    ]
    samples = read_samples_at(manifests, [location for group in shown for location in group])

    parts = [paragraph("The first sample of each group is kept.")]
    for rows, locations in zip(members, shown, strict=False):
        cards = []
        for location in locations:
            shard = manifests[location.dataset].shards[location.shard].name
            label = f"{shard} #{location.sample}"
            cards.append(sample_card(samples[location], sample_keys(args), label))
        hidden = len(rows) - len(locations)
        more = paragraph(f"and {hidden:,} more") if hidden else ""
        parts.append(f'<div class="group">{flex_row(cards)}{more}</div>')

    return html_page(f"{counted(len(members), 'group')} of duplicates by {args.by}", parts)
