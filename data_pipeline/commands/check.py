"""`vlmoe data check`: verifies every sample against the manifest."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from data_pipeline.commands.options import (
    add_datasets,
    add_parts,
    add_sample_keys,
    add_workers,
    report_unavailable,
    sample_keys,
    workers_of,
)
from data_pipeline.common import storage
from data_pipeline.common.commands import Subparsers, add_command
from data_pipeline.common.json_file import write_json
from data_pipeline.common.tables import counted, join_counts

if TYPE_CHECKING:
    from data_pipeline.preparing.check import CheckReport

_EXAMPLES = """\
  vlmoe data check shards/
  vlmoe data check s3://bucket/pairs --decode --drop-list corrupt.json
  vlmoe data check 's3://bucket/{cc3m,coco}' --workers 16 --json report.json

Compares the size and SHA-256 of every shard, its index, and the CRC-32 of every sample; --decode
also decodes every image and reads every caption. The files of shards and folders are then counted a
second time, with Python's tarfile and the file system: no file of a shard may be missing from its
index, and no shard beside the manifest from that. The exit status is 1 if there are any findings.
To exclude the corrupt samples from training, set `drop` of the data.train source to the drop-list.
Unavailable shards are listed, but not added to the drop-list."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    check = add_command(
        subparsers,
        "check",
        summary="verify every sample against the manifest",
        examples=_EXAMPLES,
        description="Verify every sample of datasets, and list corrupt and missing ones.",
    )
    add_datasets(check)
    check.add_argument("--decode", action="store_true", help="also decode images and read captions")
    check.add_argument(
        "--no-count", action="store_true", help="do not count the files a second time"
    )
    add_sample_keys(check)
    check.add_argument(
        "--first", metavar="N", type=int, default=10, help="findings to print (default: 10)"
    )
    check.add_argument("--json", metavar="FILE", default="", help="write all findings as JSON")
    check.add_argument(
        "--drop-list", metavar="FILE", default="", help="write a drop-list of the corrupt samples"
    )
    add_workers(check)
    add_parts(check)
    check.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> int:
    """Check the datasets and print a table."""
    from data_pipeline.common.processes import SINGLE_PART, parse_part
    from data_pipeline.preparing.check import check
    from data_pipeline.preparing.drop_lists import write_drop_lists
    from data_pipeline.preparing.shard_map import require_work_dir
    from data_pipeline.preparing.tasks import open_datasets

    part = parse_part(args.part)
    require_work_dir(part, args.work_dir)
    manifests = open_datasets(args.datasets)
    report = check(
        manifests,
        decode=args.decode,
        count=not args.no_count,
        keys=sample_keys(args),
        workers=workers_of(args),
        part=part,
        work_dir=args.work_dir,
    )
    if part != SINGLE_PART:
        print(
            f"part {args.part}: {_counts(report)}, {counted(len(report.findings), 'finding')}; run "
            f"without --part to report all"
        )
        return report_unavailable(report.unavailable)

    _print_report(report, args)
    if args.json:
        rows = [finding._asdict() for finding in report.findings]
        content = {
            "samples": report.samples,
            "shards": report.shards,
            "files_in_samples": report.files.in_samples,
            "files_ignored": report.files.ignored,
            "shards_not_counted": report.not_counted,
            "folders": [
                {
                    "folder": storage.redact(folder.folder),
                    "shards_not_in_manifest": folder.shards,
                    "shards_below": folder.shards_below,
                    "other_files": dict(folder.others),
                    "problem": folder.problem,
                }
                for folder in report.folders
            ],
            "findings": rows,
        }
        write_json(args.json, content)
    if args.drop_list:
        about = {"made by": "vlmoe data check" + (" --decode" if args.decode else "")}
        corrupt = [report.corrupt_samples(index) for index in range(len(manifests))]
        print("\n".join(write_drop_lists(args.drop_list, manifests, corrupt, about)))

    if not args.no_count:
        _print_counts(report)
    report_unavailable(report.unavailable)
    return 1 if report.findings else 0


def _counts(report: CheckReport) -> str:
    return f"{counted(report.samples, 'sample')} of {counted(report.shards, 'shard')}"


def _print_counts(report: CheckReport) -> None:
    """What was counted without the index and the manifest."""
    from data_pipeline.common.escaping import escape_control

    ignored = report.files.ignored
    print(
        f"counted again: {counted(report.files.in_samples, 'file')} in samples, "
        f"{ignored.total():,} ignored"
        + (f" ({join_counts(ignored)})" if ignored else "")
        + (
            f"; not counted: {counted(report.not_counted, 'corrupt or salvaged shard')}"
            if report.not_counted
            else ""
        )
    )
    for folder in report.folders:
        for line in folder.lines():
            print(escape_control(line))


def _print_report(report: CheckReport, args: argparse.Namespace) -> None:
    from data_pipeline.common.escaping import escape_control
    from data_pipeline.common.tables import format_table, truncate
    from data_pipeline.preparing.check import describe_location

    if not report.findings:
        decoded = "; all images and captions are readable" if args.decode else ""
        print(f"{_counts(report)}: all match the manifest{decoded}")
        return

    table = format_table(["finding", "samples", "shards"], report.counts_by_reason())
    print(f"{_counts(report)}:\n{table}")

    # The samples of a missing shard have no detail and are not printed one by one.
    detailed = [finding for finding in report.findings if finding.detail]
    for finding in detailed[: args.first]:
        location = escape_control(describe_location(finding))
        detail = truncate(escape_control(finding.detail), 200)
        print(f"  {location}: {finding.reason}: {detail}")
    if len(detailed) > args.first:
        hint = "" if args.json else "; --json FILE writes all"
        print(f"  and {len(detailed) - args.first:,} more{hint}")
