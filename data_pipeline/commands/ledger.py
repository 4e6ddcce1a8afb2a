"""`vlmoe data ledger`: verifies that training read every sample exactly as planned."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.common.commands import Subparsers, add_command
from data_pipeline.common.tables import counted, format_rows

if TYPE_CHECKING:
    from data_pipeline.loading.ledger_check import LedgerReport, PhaseOrder
    from data_pipeline.loading.ledger_metadata import LedgerMetadata, LedgerPhase

_EXAMPLES = """\
  vlmoe data ledger runs/b16
  vlmoe data ledger runs/b16/ledger
  vlmoe data ledger runs/b16 --data b16.yaml    the run file, if its URLs are presigned

Enable the ledger with data.ledger=true. The exit status is 1 if, over all ranks and restarts, a
sample was lost, read twice, or read at another position than the data order defines."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    ledger = add_command(
        subparsers,
        "ledger",
        summary="verify that a run read every sample exactly once",
        examples=_EXAMPLES,
        description="Compare the samples recorded for every step of a run with the data order,\n"
        "which is recomputed from the manifests.",
    )
    ledger.add_argument(
        "folder", metavar="RUN_DIR", type=Path, help="run folder, or the `ledger` folder in it"
    )
    ledger.add_argument(
        "--data",
        metavar="FILE",
        default="",
        help="YAML file with the run's data.train; needed if its URLs are presigned",
    )
    ledger.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> int:
    """Check the ledger and print a table."""
    report = _check(args)
    steps = f"{report.first_step:,} to {report.first_step + report.steps - 1:,}"
    if report.first_step > 1:
        steps += "; earlier steps were not recorded"
    rows = [
        ("steps", steps),
        ("positions", f"{report.begin:,} to {report.end:,}"),
        *_phase_rows(report),
        ("ranks", ", then ".join(map(str, report.world_sizes))),
        ("samples recorded", f"{report.samples:,}"),
        ("  corrupt", f"{report.corrupt:,}"),
        ("  filtered", f"{report.filtered:,}"),
        ("lost", f"{report.lost:,}"),
        ("unexpected", f"{report.unexpected:,}"),
        ("steps out of order", f"{report.misplaced:,}"),
    ]
    print(format_rows(rows))

    if report.is_complete:
        print("every step read exactly the samples that the data order defines")
        return 0
    print("\n".join(["", *(f"- {problem}" for problem in report.problems)]))
    return 1


def _phase_rows(report: LedgerReport) -> list[tuple[str, str]]:
    """Recorded samples of each phase; no rows for a single phase."""
    if len(report.phases) < 2:
        return []
    return [
        (f"  phase {phase.number}", f"from {phase.begin:,}: {counted(phase.samples, 'sample')}")
        for phase in report.phases
    ]


def _check(args: argparse.Namespace) -> LedgerReport:
    """Recompute the data order and compare the ledger with it."""
    from data_pipeline.common.errors import DataError
    from data_pipeline.loading.ledger_check import check_ledger
    from data_pipeline.loading.ledger_metadata import METADATA_FILE

    folder = args.folder if (args.folder / METADATA_FILE).exists() else args.folder / "ledger"
    if not (folder / METADATA_FILE).exists():
        raise DataError(
            f"there is no ledger in {args.folder}; train with data.ledger=true to record one"
        )

    metadata = _read_metadata(folder, args.data)
    phases = [
        _phase_order(folder, metadata.seed, number, phase)
        for number, phase in enumerate(metadata.phases, start=1)
        if phase.sources
    ]
    return check_ledger(folder, phases, metadata.skip)


def _phase_order(folder: Path, seed: int, number: int, phase: LedgerPhase) -> PhaseOrder:
    """Recompute the order of one phase."""
    from data_pipeline.common.errors import DataError
    from data_pipeline.loading.batch_samplers import shard_starts
    from data_pipeline.loading.ledger_check import PhaseOrder
    from data_pipeline.loading.sources import data_fingerprint, make_order, open_sources
    from data_pipeline.order.state import phase_seed

    urls = {config.shards: url for config, url in zip(phase.sources, phase.manifests, strict=True)}
    sources = open_sources(phase.sources, manifest_urls=urls)
    if data_fingerprint(sources, phase.shuffle_window) != phase.data:
        raise DataError(
            f"the shards, weights or drop-lists are not those of phase {number} of {folder}; "
            f"they define a different data order, so the ledger cannot be checked"
        )
    order = make_order(sources, phase_seed(seed, number), phase.shuffle_window, phase.begin)
    return PhaseOrder(number, order, shard_starts([source.manifest for source in sources]))


def _read_metadata(folder: Path, run_file: str) -> LedgerMetadata:
    """The ledger's metadata, with the URLs of the run file if it is given."""
    from data_pipeline.common.config import from_mapping
    from data_pipeline.common.errors import ConfigError
    from data_pipeline.common.yaml_file import load_yaml
    from data_pipeline.loading.ledger_metadata import LedgerMetadata
    from data_pipeline.settings import DataConfig

    metadata = LedgerMetadata.read(folder)
    if not run_file:
        return metadata

    section = load_yaml(run_file).get("data")
    if not isinstance(section, dict) or "train" not in section:
        raise ConfigError(f"{run_file} has no data.train")
    settings = from_mapping(DataConfig, {"train": section["train"]}, source=run_file)
    return metadata.with_addresses(settings.sources)
