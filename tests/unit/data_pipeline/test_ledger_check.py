"""Comparing a ledger with the order: complete runs, restarts, and every kind of mismatch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.commands import ledger as command
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.loading.ledger import Ledger, Record, rank_file, rank_files, read_records
from data_pipeline.loading.ledger_check import check_ledger
from data_pipeline.loading.ledger_metadata import LedgerMetadata
from data_pipeline.loading.sources import open_sources
from data_pipeline.settings import SourceConfig
from data_pipeline.shards.manifest import Manifest
from tests.support.http_server import http_server
from tests.support.simulated_training import (
    CORRUPT_SAMPLE,
    FILTERED_SAMPLE,
    GLOBAL_BATCH_SIZE,
    MICRO_BATCH_SIZE,
    SimulatedTraining,
    batch_of,
    simulated_training,
)
from tests.support.small_shards import make_shards


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    return [
        make_shards(folders[0], count=19),
        make_shards(folders[1], count=9, samples_per_shard=4),
    ]


@pytest.fixture
def training(manifests: list[Manifest], tmp_path: Path) -> SimulatedTraining:
    return simulated_training(manifests, tmp_path / "ledger")


def run_command(folder: Path, data: str = "") -> int:
    return command.handle(argparse.Namespace(folder=folder, data=data))


def test_uninterrupted_run(training: SimulatedTraining, capsys: pytest.CaptureFixture[str]) -> None:
    training.train(7, world_size=2)
    report = training.check()
    assert report.is_complete, report.problems
    count = 7 * GLOBAL_BATCH_SIZE
    assert (report.steps, report.samples, report.end) == (7, count, count)
    assert report.world_sizes == [2]

    ids = training.sample_ids(count)
    assert report.corrupt == ids.count(CORRUPT_SAMPLE) > 0
    assert report.filtered == ids.count(FILTERED_SAMPLE) > 0

    assert run_command(training.folder) == run_command(training.folder.parent) == 0
    out = capsys.readouterr().out
    assert re.search(r"lost +0\n", out)
    assert "every step" in out.splitlines()[-1]


def test_restarts_with_other_world_sizes(training: SimulatedTraining) -> None:
    """Two steps beyond each checkpoint are repeated, with another number of ranks."""
    for world_size in (1, 2, 4, 1, 8, 2):
        training.train(5, world_size)
        training.train(3, world_size)
        training.save(3)
    training.train(2, world_size=1)
    report = training.check()
    assert report.is_complete, report.problems
    assert report.steps == 20
    assert report.world_sizes == [1, 2, 4, 1, 8, 2, 1]
    assert len(rank_files(training.folder)) == 8


def test_skipped_positions(training: SimulatedTraining) -> None:
    training.train(3, world_size=2)
    training.save(3)
    training.state = training.state.with_skipped(4 * GLOBAL_BATCH_SIZE, 5 * GLOBAL_BATCH_SIZE + 3)
    training.train(4, world_size=2)
    report = training.check()
    assert report.is_complete, report.problems
    assert report.end == 8 * GLOBAL_BATCH_SIZE + 3

    # Without the skipped range, the same ledger does not match.
    assert check_ledger(training.folder, training.phases).lost > 0


def rewrite(training: SimulatedTraining, change: Callable[[list[Record]], list[Record]]) -> None:
    """Write rank 0's file again with changed records."""
    path = training.folder / rank_file(0)
    records = list(read_records(path))
    path.unlink()
    with closing(
        Ledger.open(
            training.folder,
            rank=0,
            world_size=1,
            micro_batch_size=MICRO_BATCH_SIZE,
            resumed_step=0,
        )
    ) as ledger:
        for record in change(records):
            ledger._world_size, ledger._last_step = record.world_size, record.step - 1
            flagged = torch.from_numpy(np.array(record.samples))
            batch = batch_of([])._replace(ids=flagged)
            ledger.add(record.step, record.before, record.after, [batch])


def swap(records: list[Record], step: int, first: int, second: int) -> list[Record]:
    """Exchange two samples of a step."""
    samples = records[step].samples.copy()
    samples[[first, second]] = samples[[second, first]]
    records[step] = records[step]._replace(samples=samples)
    return records


def put(records: list[Record], step: int, index: int, sample: int) -> list[Record]:
    """Overwrite one sample of a step."""
    samples = records[step].samples.copy()
    samples[index] = sample
    records[step] = records[step]._replace(samples=samples)
    return records


@pytest.mark.parametrize(
    ("change", "lost", "unexpected", "message"),
    [
        (lambda r: put(r, 1, 3, 27), 1, 1, r"step 2: 1 sample lost \(\d+\), 1 unexpected \(27\)"),
        (lambda r: put(r, 1, 3, int(r[1].ids[4])), 1, 1, "step 2: 1 sample lost"),
        (
            lambda r: [r[0], r[1]._replace(samples=r[1].samples[:-1]), r[2]],
            1,
            0,
            "step 2: 1 sample lost",
        ),
        (
            lambda r: [r[0], r[1]._replace(samples=np.append(r[1].samples, 3)), r[2]],
            0,
            1,
            "0 samples.*1 unexpected",
        ),
        (lambda r: swap(r, 2, 0, 5), 0, 0, "step 3: .*order"),
        (lambda r: swap(r, 2, 6, 7), 0, 0, "step 3: .*order"),
        (lambda r: [r[0], r[2]], GLOBAL_BATCH_SIZE, 0, "step 2 is missing"),
        (
            lambda r: [r[0], r[1], r[2]._replace(before=r[2].before + 1, after=r[2].after + 1)],
            2,
            1,
            "step 3 begins at",
        ),
        (lambda r: [r[0]._replace(world_size=2), *r[1:]], 0, 0, r"rank\(s\) 1 of 2"),
        (
            lambda r: [r[0], r[1]._replace(after=r[1].after + 2), r[2]],
            2,
            0,
            "step 2: 2 samples lost",
        ),
        (lambda r: [], 0, 0, "no step"),
    ],
)
def test_mismatches_are_reported(
    training: SimulatedTraining,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[list[Record]], list[Record]],
    lost: int,
    unexpected: int,
    message: str,
) -> None:
    training.train(3)
    rewrite(training, change)
    report = training.check()
    assert not report.is_complete
    assert (report.lost, report.unexpected) == (lost, unexpected)
    assert re.search(message, "\n".join(report.problems)), report.problems
    assert run_command(training.folder) == 1
    assert re.search(message, capsys.readouterr().out)


def test_missing_rank_file(training: SimulatedTraining) -> None:
    training.train(2, world_size=2)
    (training.folder / rank_file(1)).unlink()
    report = training.check()
    assert not report.is_complete
    assert report.lost == GLOBAL_BATCH_SIZE

    (training.folder / rank_file(0)).unlink()
    with pytest.raises(DataError, match=r"no ledger in .*data.ledger=true"):
        training.check()


def test_ledger_enabled_during_a_run(
    training: SimulatedTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    training.end_position = 4 * GLOBAL_BATCH_SIZE
    training.save(4)
    training.train(3)
    report = training.check()
    assert report.is_complete, report.problems
    assert (report.first_step, report.steps, report.begin) == (5, 3, 4 * GLOBAL_BATCH_SIZE)
    assert run_command(training.folder) == 0
    assert "5 to 7; earlier steps" in capsys.readouterr().out


def test_other_data_is_an_error(training: SimulatedTraining, tmp_path: Path) -> None:
    training.train(1)
    metadata = LedgerMetadata.read(training.folder)
    phase = replace(metadata.phases[0], shuffle_window=3)
    replace(metadata, phases=(phase,)).write(training.folder)
    with pytest.raises(DataError, match="shards, weights or drop-lists"):
        run_command(training.folder)
    with pytest.raises(DataError, match="no ledger in"):
        run_command(tmp_path / "missing")


def test_signed_addresses_are_read_from_the_run_file(tmp_path: Path) -> None:
    make_shards(tmp_path / "data", count=19)
    with http_server(tmp_path / "data", query="sig=SECRET") as server:
        signed = f"{server.url('manifest.json')}?sig=SECRET"
        sources = open_sources([SourceConfig(shards=signed)])
        SimulatedTraining(sources, tmp_path / "ledger").train(1)
        with pytest.raises(StorageError, match="manifest"):
            run_command(tmp_path)

        (tmp_path / "run.yaml").write_text(f"data: {{train: ['{signed}']}}\n")
        assert run_command(tmp_path, data=str(tmp_path / "run.yaml")) == 0
