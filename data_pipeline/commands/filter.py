"""`vlmoe data filter`: finds the samples that filters exclude, and writes a drop-list."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.commands.options import (
    add_datasets,
    add_parts,
    add_sample_keys,
    add_workers,
    report_unavailable,
    sample_keys,
    workers_of,
)
from data_pipeline.common.commands import Subparsers, add_command
from data_pipeline.common.errors import ConfigError
from data_pipeline.common.tables import counted

if TYPE_CHECKING:
    from data_pipeline.preparing.filtering import FilterReport
    from data_pipeline.sample_keys import SampleKeys
    from data_pipeline.settings import FilterConfig

_EXAMPLES = """\
  vlmoe data filter shards/ --min-side 64 --max-aspect 3 --drop-list drop.json
  vlmoe data filter s3://bucket/laion --require 'json:similarity >= 0.28' \\
      --require 'json:NSFW == "UNLIKELY"'
  vlmoe data filter shards/ --config run.yaml --drop-list drop.json       the filters of a run

Training applies the same filters (data.filters) to every sample that it reads. If `drop` of
a data.train source is set to the drop-list, the excluded samples are not read at all. Corrupt
samples are also excluded. The exit status is 1 if a shard is unavailable."""

_FILTER_OPTIONS = ("min_side", "max_aspect", "min_caption_chars", "max_caption_chars", "require")


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    filters = add_command(
        subparsers,
        "filter",
        summary="find samples that filters exclude, and write a drop-list",
        examples=_EXAMPLES,
        description="Apply filters to every sample, using image headers and text, without decoding "
        "images.",
    )
    add_datasets(filters)
    _add_filter_options(filters)
    filters.add_argument(
        "--config",
        metavar="FILE",
        default="",
        help="YAML file with filters: a run file or a section `filters:`; the options above take "
        "precedence",
    )
    add_sample_keys(filters)
    filters.add_argument("--drop-list", metavar="FILE", default="", help="write a drop-list")
    add_workers(filters)
    add_parts(filters)
    filters.set_defaults(handle=handle)


def _add_filter_options(parser: argparse.ArgumentParser) -> None:
    """Add `_FILTER_OPTIONS`; None means not given."""
    parser.add_argument(
        "--min-side",
        metavar="PIXELS",
        type=int,
        default=None,
        help="minimum of an image's shorter side",
    )
    parser.add_argument(
        "--max-aspect",
        metavar="RATIO",
        type=float,
        default=None,
        help="maximum ratio of the longer to the shorter side",
    )
    parser.add_argument(
        "--min-caption-chars",
        metavar="N",
        type=int,
        default=None,
        help="minimum length of a caption",
    )
    parser.add_argument(
        "--max-caption-chars",
        metavar="N",
        type=int,
        default=None,
        help="maximum length of a caption",
    )
    parser.add_argument(
        "--require",
        metavar="CONDITION",
        action="append",
        default=None,
        help="condition on a field of the .json member; may be repeated",
    )


def handle(args: argparse.Namespace) -> int:
    """Filter the datasets and print a table."""
    from data_pipeline.common.config import to_mapping
    from data_pipeline.common.processes import SINGLE_PART, parse_part
    from data_pipeline.preparing.drop_lists import write_drop_lists
    from data_pipeline.preparing.filtering import filter_samples
    from data_pipeline.preparing.shard_map import require_work_dir
    from data_pipeline.preparing.tasks import open_datasets

    part = parse_part(args.part)
    require_work_dir(part, args.work_dir)
    filters, keys = _filters(args)
    manifests = open_datasets(args.datasets)
    report = filter_samples(
        manifests,
        filters,
        keys=keys,
        workers=workers_of(args),
        part=part,
        work_dir=args.work_dir,
    )
    if part != SINGLE_PART:
        print(
            f"part {args.part}: {counted(report.samples, 'sample')}; run without --part to "
            f"combine all"
        )
        return report_unavailable(report.unavailable)

    _print_report(report)
    if args.drop_list:
        about: dict[str, Any] = {"made by": "vlmoe data filter", "filters": to_mapping(filters)}
        print("\n".join(write_drop_lists(args.drop_list, manifests, report.dropped, about)))
    return report_unavailable(report.unavailable)


def _print_report(report: FilterReport) -> None:
    from data_pipeline.common.escaping import escape_control
    from data_pipeline.common.tables import format_table, truncate

    num_samples, excluded = max(1, report.samples), report.reasons.total()
    rows = [
        (reason, count, f"{count / num_samples:.2%}")
        for reason, count in report.reasons.most_common()
    ]
    rows.append(("kept", report.samples - excluded, f"{1 - excluded / num_samples:.2%}"))
    print(format_table(["excluded by", "samples", "ratio"], rows))
    for reason, example in report.examples.items():
        print(f"  first {reason}: {truncate(escape_control(example), 160)}")


def _filters(args: argparse.Namespace) -> tuple[FilterConfig, SampleKeys]:
    """The filters and keys of the config file overridden by the options."""
    from data_pipeline.common.config import from_mapping, load_yaml, to_mapping
    from data_pipeline.preparing.filtering import filters_from_mapping
    from data_pipeline.sample_keys import DEFAULT_KEYS, SampleKeys
    from data_pipeline.settings import FilterConfig

    base, keys = FilterConfig(), DEFAULT_KEYS
    if args.config:
        # A preset that the file extends belongs to the trainer and has no filters, so it is
        # replaced by an empty file.
        content = load_yaml(Path(args.config), lambda name: Path(os.devnull))
        base, keys = filters_from_mapping(content, args.config)

    options = {
        name: value for name in _FILTER_OPTIONS if (value := getattr(args, name)) is not None
    }
    filters = from_mapping(FilterConfig, to_mapping(base) | options)
    if filters == FilterConfig():
        raise ConfigError("no filter is given; use --min-side, --require ... or --config FILE")
    given = sample_keys(args)
    return filters, SampleKeys(
        given.images if args.image_key else keys.images,
        given.captions if args.caption_key else keys.captions,
    )
