"""`vlmoe data stats`: dataset statistics as tables, JSON and an HTML page."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

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

    from data_pipeline.preparing.stats import Stats
    from data_pipeline.sample_keys import SampleKeys
    from data_pipeline.shards.manifest import Manifest

_EXAMPLES = """\
  vlmoe data stats shards/
  vlmoe data stats shards/ --tokenizer tokenizer.model --html stats.html
  vlmoe data stats 's3://bucket/{a,b}' --samples 0 --caption-key txt --caption-key json:captions

Measures a random subset of the samples (default: 20,000; --samples 0 measures all). Scripts are
Unicode scripts (Latin, Han, Cyrillic ...), a coarse indicator of language that does not separate
English from German. Captions are cleaned when they are read; the characters that this removes are
counted by kind."""

_SAMPLES_ON_PAGE = 48
_MAX_ROWS = 12
"""Maximum number of rows in a table of frequencies."""

_Row = tuple[object, ...]


class _Table(NamedTuple):
    title: str
    headings: list[str]
    rows: list[_Row]


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    stats = add_command(
        subparsers,
        "stats",
        summary="image sizes, caption lengths, scripts and duplicates",
        examples=_EXAMPLES,
        description="Measure images and captions.",
    )
    add_datasets(stats)
    stats.add_argument(
        "--samples",
        metavar="N",
        type=int,
        default=20_000,
        help="number of random samples (default: 20000)",
    )
    stats.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed for choosing samples (default: 0)"
    )
    add_sample_keys(stats)
    stats.add_argument(
        "--tokenizer", metavar="FILE", default="", help="also count the tokens of captions"
    )
    stats.add_argument("--json", metavar="FILE", default="", help="write all statistics as JSON")
    stats.add_argument(
        "--html",
        metavar="FILE",
        default="",
        help="write an HTML page with histograms and sample images",
    )
    add_workers(stats)
    add_parts(stats)
    stats.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> int:
    """Measure the datasets and print tables."""
    from data_pipeline.common import storage
    from data_pipeline.common.processes import SINGLE_PART, parse_part
    from data_pipeline.common.tables import format_table
    from data_pipeline.preparing.shard_map import require_work_dir
    from data_pipeline.preparing.stats import compute_stats
    from data_pipeline.preparing.tasks import open_datasets

    part, keys = parse_part(args.part), sample_keys(args)
    require_work_dir(part, args.work_dir)
    manifests = open_datasets(args.datasets)
    stats = compute_stats(
        manifests,
        samples=args.samples,
        seed=args.seed,
        keys=keys,
        tokenizer=args.tokenizer,
        workers=workers_of(args),
        part=part,
        work_dir=args.work_dir,
    )
    if part != SINGLE_PART:
        print(
            f"part {args.part}: {counted(stats.num_samples, 'sample')}; run without --part to "
            f"combine all"
        )
        return report_unavailable(stats.unavailable)

    total = sum(manifest.total_samples for manifest in manifests)
    note = _subset_note(stats, total, args.seed)
    datasets, *tables = [table for table in _tables(stats, manifests, keys) if table.rows]
    sections = [format_table(table.headings, table.rows) for table in tables]
    print("\n\n".join([format_table(datasets.headings, datasets.rows), note, *sections]))

    if args.json:
        shards = sum(len(manifest.shards) for manifest in manifests)
        content = {"samples": total, "shards": shards} | stats.to_json(keys.captions)
        write_json(args.json, content)
    if args.html:
        page = _html(stats, manifests, keys, [datasets, *tables], note, args.seed)
        storage.write_bytes(args.html, page)
        print(f"\n{shown(args.html)}")
    return report_unavailable(stats.unavailable)


def _subset_note(stats: Stats, total: int, seed: int) -> str:
    if stats.num_samples == total:
        return f"measured all {counted(total, 'sample')}"
    return (
        f"measured {stats.num_samples:,} of {total:,} samples, chosen at random with --seed "
        f"{seed}; duplicates are counted among these (`vlmoe data dedup` compares all)"
    )


def _tables(stats: Stats, manifests: Sequence[Manifest], keys: SampleKeys) -> list[_Table]:
    summary = stats.to_json(keys.captions)
    quantities: list[_Row] = [
        (name, *(_format_number(value) for value in row.values()))
        for name, row in summary["quantities"].items()
    ]
    quantity_headings = list(next(iter(summary["quantities"].values()), {}))

    num_samples = max(1, stats.num_samples)
    duplicates: list[_Row] = [
        (name, count, f"{count / num_samples:.2%}") for name, count in summary["duplicates"].items()
    ]
    removed = list(stats.removed_characters.elements())
    num_captions = max(1, len(stats.caption_chars))
    unreadable = _count_rows(list(stats.corrupt.elements()), num_samples)
    return [
        _datasets_table(manifests),
        _Table("Quantities", ["", *quantity_headings], quantities),
        _Table("Image formats", ["format", "images", "ratio"], _count_rows(stats.formats)),
        _Table("Scripts", ["script", "captions", "ratio"], _count_rows(stats.scripts)),
        _Table(
            "Removed characters",
            ["removed from captions", "captions", "ratio"],
            _count_rows(removed, num_captions),
        ),
        _Table("Duplicates", ["duplicates", "samples", "ratio"], duplicates),
        _Table("Unreadable samples", ["unreadable", "samples", "ratio"], unreadable),
    ]


def _datasets_table(manifests: Sequence[Manifest]) -> _Table:
    from data_pipeline.common.tables import format_bytes

    rows: list[_Row] = []
    for manifest in manifests:
        samples = [entry.samples for entry in manifest.shards]
        size = format_bytes(sum(entry.bytes for entry in manifest.shards))
        per_shard = f"{min(samples):,}"
        if min(samples) != max(samples):
            per_shard += f" to {max(samples):,}"
        rows.append((shown(manifest.url), len(samples), sum(samples), per_shard, size))

    headings = ["dataset", "shards", "samples", "samples per shard", "bytes"]
    return _Table("Datasets", headings, rows)


def _count_rows(values: list[str], total: int = 0) -> list[_Row]:
    """The most frequent values, with their counts and ratios."""
    total = total or max(1, len(values))
    most_common = Counter(values).most_common(_MAX_ROWS)
    return [(value, count, f"{count / total:.1%}") for value, count in most_common]


def _format_number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.3g}"


def _html(
    stats: Stats,
    manifests: Sequence[Manifest],
    keys: SampleKeys,
    tables: Sequence[_Table],
    note: str,
    seed: int,
) -> bytes:
    """HTML page with histograms, the tables, and some random samples."""
    from data_pipeline.preparing.html_report import (
        flex_row,
        heading,
        histogram,
        html_page,
        html_table,
        paragraph,
    )
    from data_pipeline.preparing.sample_views import read_tasks, sample_card
    from data_pipeline.preparing.tasks import sample_tasks

    histograms = [
        histogram(name, values) for name, values in stats.quantities(keys.captions).items()
    ]
    parts = [paragraph(note), flex_row(histograms)]
    for table in tables:
        parts += [heading(table.title), html_table(table.headings, table.rows)]

    cards = []
    for task, index, raw in read_tasks(sample_tasks(manifests, _SAMPLES_ON_PAGE, seed)):
        cards.append(sample_card(raw, keys, f"{task.entry.name} #{index}"))
    parts += [heading("Samples"), flex_row(cards)]
    return html_page("Dataset statistics", parts)
