"""`vlmoe data filter`: which samples the filters leave out, as a drop-list."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
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
from data_pipeline.common.errors import ConfigError

if TYPE_CHECKING:
    from data_pipeline.settings import FilterConfig

_EXAMPLES = """\
  vlmoe data filter shards/ --min-side 64 --max-aspect 3 --drop-list drop.json
  vlmoe data filter s3://bucket/laion --require 'json:similarity >= 0.28' --require 'json:NSFW == "UNLIKELY"'
  vlmoe data filter shards/ --config run.yaml --drop-list drop.json       the filters of a run

Training applies the same filters (data.filters) to every sample that it reads. With the drop-list as a
source's `drop` it does not even read those that would be left out. Damaged samples are left out as well. The exit
status is 1 if a shard could not be had."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    filters = add_command(
        subparsers,
        "filter",
        summary="find what filters leave out, and write a drop-list",
        examples=_EXAMPLES,
        description="Ask filters about every sample, from headers and texts, without decoding pictures.",
    )
    add_datasets(filters)
    filters.add_argument(
        "--min-side", metavar="PIXELS", type=int, default=None, help="shortest side of a picture"
    )
    filters.add_argument(
        "--max-aspect",
        metavar="RATIO",
        type=float,
        default=None,
        help="largest ratio of the longer to the shorter side",
    )
    filters.add_argument(
        "--min-caption-chars", metavar="N", type=int, default=None, help="shortest caption"
    )
    filters.add_argument(
        "--max-caption-chars", metavar="N", type=int, default=None, help="longest caption"
    )
    filters.add_argument(
        "--require",
        metavar="CONDITION",
        action="append",
        default=None,
        help="a condition on a field of the .json member; may be repeated",
    )
    filters.add_argument(
        "--config",
        metavar="FILE",
        default="",
        help="YAML with filters: a run file or a section `filters:`; options above win over it",
    )
    add_caption_keys(filters)
    filters.add_argument("--drop-list", metavar="FILE", default="", help="write a drop-list")
    add_workers(filters)
    add_parts(filters)
    filters.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> int:
    """Filter, and print a table."""
    from data_pipeline.common.config import to_mapping
    from data_pipeline.common.harmless import harmless
    from data_pipeline.common.processes import WHOLE, parse_part
    from data_pipeline.preparing.drop_lists import write_drop_lists
    from data_pipeline.preparing.filtering import filter_samples
    from data_pipeline.preparing.tables import shortened, table
    from data_pipeline.preparing.visit import need_work_for, open_datasets

    part = parse_part(args.part)
    need_work_for(part, args.work)
    filters, keys = _filters(args)
    manifests = open_datasets(args.datasets)
    done = filter_samples(
        manifests, filters, caption_keys=keys, workers=workers_of(args), part=part, work=args.work
    )
    if part != WHOLE:
        print(
            f"part {args.part}: {done.samples:,} samples; the same line without --part puts all together"
        )
        return report_unread(done.unread)
    rows = [
        (reason, count, f"{count / max(1, done.samples):.2%}")
        for reason, count in done.reasons.most_common()
    ]
    total = done.reasons.total()
    rows.append(("kept", done.samples - total, f"{1 - total / max(1, done.samples):.2%}"))
    print(table(["left out by", "samples", "share"], rows))
    for reason, example in done.examples.items():
        print(f"  first {reason}: {shortened(harmless(example), 160)}")
    if args.drop_list:
        about: dict[str, Any] = {"made by": "vlmoe data filter", "filters": to_mapping(filters)}
        print("\n".join(write_drop_lists(args.drop_list, manifests, done.dropped, about)))
    return report_unread(done.unread)


def _filters(args: argparse.Namespace) -> tuple[FilterConfig, list[str]]:
    """The filters of the file with the options over them, and the caption keys."""
    from data_pipeline.common.config import from_mapping, load_yaml, to_mapping
    from data_pipeline.preparing.filtering import filters_in
    from data_pipeline.settings import FilterConfig

    base, keys = FilterConfig(), None
    if args.config:
        # A preset that the file extends is the trainer's, and has no filters: it is read as an
        # empty file.
        base, keys = filters_in(
            load_yaml(Path(args.config), lambda name: Path(os.devnull)), args.config
        )
    names = ("min_side", "max_aspect", "min_caption_chars", "max_caption_chars", "require")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    filters = from_mapping(FilterConfig, to_mapping(base) | given)
    if filters == FilterConfig():
        raise ConfigError("there is no filter; give --min-side, --require ... or --config FILE")
    return filters, args.caption_key or list(keys or ["txt"])
