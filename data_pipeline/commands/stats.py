"""`vlmoe data stats`: what datasets are made of, as tables, JSON and a page to look at."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import TYPE_CHECKING

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

    from data_pipeline.preparing.stats import Stats
    from data_pipeline.shards.manifest import Manifest

_EXAMPLES = """\
  vlmoe data stats shards/
  vlmoe data stats shards/ --tokenizer tokenizer.model --html stats.html
  vlmoe data stats 's3://bucket/{cc3m,coco}' --samples 0 --caption-key txt --caption-key json:captions

Looks at samples drawn at random (20,000 unless told otherwise; --samples 0 is all). Scripts are those of
Unicode (Latin, Han, Cyrillic ...): a first look at languages, which does not tell English from German."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    stats = add_command(
        subparsers,
        "stats",
        summary="sizes, shapes, caption lengths, scripts and repeats",
        examples=_EXAMPLES,
        description="Measure pictures and captions.",
    )
    add_datasets(stats)
    stats.add_argument(
        "--samples", metavar="N", type=int, default=20_000, help="samples to draw (default: 20000)"
    )
    stats.add_argument("--seed", metavar="N", type=int, default=0, help="of the draw (default: 0)")
    add_caption_keys(stats)
    stats.add_argument(
        "--tokenizer", metavar="FILE", default="", help="count the tokens of captions too"
    )
    stats.add_argument("--json", metavar="FILE", default="", help="write all figures as JSON")
    stats.add_argument(
        "--html", metavar="FILE", default="", help="write a page with histograms and pictures"
    )
    add_workers(stats)
    add_parts(stats)
    stats.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> int:
    """Measure, and print tables."""
    from data_pipeline.common import storage
    from data_pipeline.common.processes import WHOLE, parse_part
    from data_pipeline.preparing.stats import measure
    from data_pipeline.preparing.tables import table
    from data_pipeline.preparing.visit import need_work_for, open_datasets

    part, keys = parse_part(args.part), args.caption_key or ["txt"]
    need_work_for(part, args.work)
    manifests = open_datasets(args.datasets)
    stats = measure(
        manifests,
        samples=args.samples,
        seed=args.seed,
        caption_keys=keys,
        tokenizer=args.tokenizer,
        workers=workers_of(args),
        part=part,
        work=args.work,
    )
    if part != WHOLE:
        print(
            f"part {args.part}: {stats.looked_at:,} samples; the same line without --part puts all together"
        )
        return report_unread(stats.unread)
    total = sum(manifest.total_samples for manifest in manifests)
    looked = _looked_at(stats, total, args.seed)
    tables = [(title, head, rows) for title, head, rows in _tables(stats, manifests, keys) if rows]
    print(
        "\n\n".join(
            [
                *(table(head, rows) for _, head, rows in tables[:1]),
                looked,
                *(table(head, rows) for _, head, rows in tables[1:]),
            ]
        )
    )
    if args.json:
        content = {"samples": total, "shards": sum(len(manifest.shards) for manifest in manifests)}
        storage.write_bytes(args.json, json.dumps(content | stats.to_json(keys), indent=1).encode())
    if args.html:
        storage.write_bytes(args.html, _page(stats, manifests, keys, tables, looked, args.seed))
        print(f"\n{storage.redact(args.html)}")
    return report_unread(stats.unread)


def _looked_at(stats: Stats, total: int, seed: int) -> str:
    if stats.looked_at == total:
        return f"looked at all {total:,} samples"
    return (
        f"looked at {stats.looked_at:,} of {total:,} samples, drawn with --seed {seed}; repeats are those among "
        f"the drawn ones (`vlmoe data dedup` looks at all)"
    )


_Table = tuple[str, list[str], list[tuple[object, ...]]]


def _tables(stats: Stats, manifests: Sequence[Manifest], keys: Sequence[str]) -> list[_Table]:
    """Title, headings and rows of each."""
    from data_pipeline.common.storage import redact
    from data_pipeline.preparing.tables import bytes_text

    figures = stats.to_json(keys)
    datasets: list[tuple[object, ...]] = []
    for manifest in manifests:
        sizes, count = (
            [entry.samples for entry in manifest.shards],
            sum(entry.bytes for entry in manifest.shards),
        )
        per_shard = (
            f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
        )
        datasets.append(
            (redact(manifest.url), len(sizes), sum(sizes), per_shard, bytes_text(count))
        )
    quantities: list[tuple[object, ...]] = [
        (name, *(_figure(value) for value in row.values()))
        for name, row in figures["quantities"].items()
    ]
    heads = list(next(iter(figures["quantities"].values()), {}))
    seen = max(1, stats.looked_at)
    repeats = [(name, count, f"{count / seen:.2%}") for name, count in figures["repeats"].items()]
    return [
        ("Datasets", ["dataset", "shards", "samples", "a shard", "bytes"], datasets),
        ("Quantities", ["", *heads], quantities),
        ("Kinds of file", ["kind of file", "pictures", "share"], _shares(stats.formats)),
        ("Scripts", ["script", "captions", "share"], _shares(stats.scripts)),
        ("Repeats", ["repeats", "samples", "share"], list(repeats)),
        (
            "Not readable",
            ["not readable", "samples", "share"],
            _shares(list(stats.bad.elements()), seen),
        ),
    ]


def _shares(values: list[str], total: int = 0) -> list[tuple[object, ...]]:
    count = total or max(1, len(values))
    return [
        (value, number, f"{number / count:.1%}")
        for value, number in Counter(values).most_common(12)
    ]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.3g}"


def _page(
    stats: Stats,
    manifests: Sequence[Manifest],
    keys: Sequence[str],
    tables: list[_Table],
    looked: str,
    seed: int,
) -> bytes:
    """Histograms, the tables, and some samples."""
    from data_pipeline.preparing.page import heading, histogram, html_table, page, paragraph, row_of
    from data_pipeline.preparing.show import read_samples, sample_card
    from data_pipeline.preparing.visit import draw

    shown = read_samples(draw(manifests, 48, seed))
    cards = [sample_card(raw, keys, f"{task.entry.name} #{number}") for task, number, raw in shown]
    histograms = [histogram(name, values) for name, values in stats.quantities(keys).items()]
    parts = [paragraph(looked), row_of(histograms)]
    for title, head, rows in tables:
        parts += [heading(title), html_table(head, rows)]
    return page("What the data are made of", [*parts, heading("Samples"), row_of(cards)])
