"""`vlmoe data ledger`: prove that training got every sample exactly as planned."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.common.commands import Subparsers, add_command

_EXAMPLES = """\
  vlmoe data ledger runs/b16
  vlmoe data ledger runs/b16/ledger
  vlmoe data ledger runs/b16 --data b16.yaml        the run's own file, where its addresses have signed queries

Keep a ledger with data.ledger=true. The exit status is 1 if a sample was lost, came twice, or came elsewhere
than the order of training has it, over all ranks and restarts."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    ledger = add_command(
        subparsers,
        "ledger",
        summary="prove that a run got every sample exactly once",
        examples=_EXAMPLES,
        description="Compare the samples that every step of a run recorded with the order of training, made again "
        "from the manifests.",
    )
    ledger.add_argument(
        "folder", metavar="RUN_DIR", type=Path, help="a run folder, or the `ledger` folder in it"
    )
    ledger.add_argument(
        "--data",
        metavar="FILE",
        default="",
        help="YAML with the run's data.train: a ledger keeps addresses without signed queries",
    )
    ledger.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> int:
    """Check, and print a table."""
    from data_pipeline.common.config import from_mapping
    from data_pipeline.common.errors import ConfigError, DataError
    from data_pipeline.common.yaml_file import load_yaml
    from data_pipeline.loading.ledger_check import check_ledger
    from data_pipeline.loading.ledger_facts import FACTS_FILE, LedgerFacts
    from data_pipeline.loading.schedules import shard_starts
    from data_pipeline.loading.sources import data_fingerprint, make_order, open_sources
    from data_pipeline.settings import DataConfig

    folder = args.folder if (args.folder / FACTS_FILE).exists() else args.folder / "ledger"
    if not (folder / FACTS_FILE).exists():
        raise DataError(
            f"there is no ledger in {args.folder}: train with data.ledger=true to keep one"
        )
    facts = LedgerFacts.read(folder)
    if args.data:
        section = load_yaml(args.data).get("data")
        if not isinstance(section, dict) or "train" not in section:
            raise ConfigError(f"{args.data} has no data.train")
        settings = from_mapping(DataConfig, {"train": section["train"]}, source=args.data)
        facts = facts.with_addresses(settings.sources)
    found = {config.shards: url for config, url in zip(facts.sources, facts.manifests, strict=True)}
    sources = open_sources(facts.sources, at=found)
    if data_fingerprint(sources, facts.shuffle_window) != facts.data:
        raise DataError(
            f"the shards, weights or drop-lists are not those that {folder} was kept for: their order would be "
            f"another, and nothing can be compared"
        )
    order = make_order(sources, facts.seed, facts.shuffle_window)
    report = check_ledger(
        folder, order, shard_starts([source.manifest for source in sources]), facts.skip
    )
    steps = f"{report.first_step:,} to {report.first_step + report.steps - 1:,}"
    if report.first_step > 1:
        steps += "; nothing is known of those before"
    rows = [
        ("steps", steps),
        ("positions", f"{report.begin:,} to {report.end:,}"),
        ("ranks", ", then ".join(map(str, report.worlds))),
        ("samples recorded", f"{report.samples:,}"),
        ("  bad", f"{report.bad:,}"),
        ("  filtered", f"{report.filtered:,}"),
        ("lost", f"{report.lost:,}"),
        ("too many", f"{report.surplus:,}"),
        ("steps out of order", f"{report.misplaced:,}"),
    ]
    print("\n".join(f"{name:<20} {value}" for name, value in rows))
    if report.is_whole:
        print("every step got exactly the samples of the order")
        return 0
    print("\n".join(["", *(f"- {problem}" for problem in report.problems)]))
    return 1
