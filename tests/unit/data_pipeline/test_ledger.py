"""Files of the ledger, which records the samples of every step and rank: format, truncation on
resume, incomplete and corrupt records.
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.loading import ledger as ledger_module
from data_pipeline.loading.ledger import Ledger, rank_file, rank_files, read_records
from data_pipeline.loading.ledger_metadata import LedgerMetadata, LedgerPhase
from data_pipeline.order.state import LoaderState
from data_pipeline.settings import SourceConfig
from data_pipeline.shards.manifest import Manifest
from tests.support.simulated_training import (
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


def recorded_steps(folder: Path, rank: int = 0) -> list[int]:
    return [record.step for record in read_records(folder / rank_file(rank))]


def test_files_of_removed_ranks_are_truncated(training: SimulatedTraining) -> None:
    training.train(6, world_size=4)
    training.train(2, world_size=1)  # from the start again
    assert [len(recorded_steps(training.folder, rank)) for rank in range(4)] == [2, 0, 0, 0]
    assert training.check().is_complete


def test_incomplete_record_is_removed(training: SimulatedTraining) -> None:
    """The file may be cut off at any byte."""
    training.train(3)
    path = training.folder / rank_file(0)
    complete = path.read_bytes()
    size = (len(complete) - 8) // 3
    for cut in (*range(9), *range(8 + 2 * size, len(complete), 7), len(complete) - 1):
        path.write_bytes(complete[:cut])
        kept = max(0, cut - 8) // size
        assert recorded_steps(training.folder) == list(range(1, kept + 1))

        # Opening the file for appending removes the incomplete record.
        fd = ledger_module._open_truncated(path, 3)
        assert os.lseek(fd, 0, os.SEEK_CUR) == os.fstat(fd).st_size == 8 + kept * size
        os.close(fd)


def test_zeros_at_the_end_are_an_incomplete_record(training: SimulatedTraining) -> None:
    """A power failure may leave zeros at the end of a file."""
    training.train(3)
    path = training.folder / rank_file(0)
    complete = path.read_bytes()
    path.write_bytes(complete[:-40] + bytes(40))
    assert len(recorded_steps(training.folder)) == 2
    path.write_bytes(complete + bytes(100))
    assert len(recorded_steps(training.folder)) == 3


def test_corruption_inside_a_file_is_an_error(training: SimulatedTraining) -> None:
    training.train(3)
    path = training.folder / rank_file(0)
    data = path.read_bytes()
    for offset in (10, 60, len(data) // 2):
        corrupt = bytearray(data)
        corrupt[offset] ^= 4
        path.write_bytes(corrupt)
        with pytest.raises(DataError, match=r"rank-00000.ledger is corrupt at byte \d+"):
            training.check()

    path.write_bytes(b"something else")
    with pytest.raises(DataError, match="is not a ledger"):
        training.check()
    with pytest.raises(StorageError, match=r"rank-00000.ledger is not a ledger"):
        training.train(1)


def test_metadata_round_trip(training: SimulatedTraining, tmp_path: Path) -> None:
    config = SourceConfig(shards="s3://b/x", weight_schedule=((0, 1.0), (5, 2.5)))
    source = replace(training.sources[0], config=config)
    state = LoaderState(seed=3, data="f", skip=((1, 5), (7, 9)))
    metadata = LedgerMetadata.of([source], 7, state)
    metadata.write(tmp_path)
    assert LedgerMetadata.read(tmp_path) == metadata
    assert metadata.phases[0].manifests == ("s3://b/x",)

    # Local addresses are stored as absolute paths: the working directory may be another later.
    local = replace(source, config=SourceConfig(shards="shards", drop="drop.json"))
    (absolute,) = LedgerMetadata.of([local], 7, LoaderState()).phases
    assert absolute.manifests == (f"{Path.cwd()}/shards",)
    assert absolute.sources[0].drop == f"{Path.cwd()}/drop.json"

    (tmp_path / "ledger.json").write_text("{}")
    with pytest.raises(DataError, match=r"ledger.json .*expected version 1"):
        LedgerMetadata.read(tmp_path)


def test_earlier_phases_keep_their_sources_but_not_their_begin(
    training: SimulatedTraining, tmp_path: Path
) -> None:
    """A run that goes back to an earlier checkpoint can begin a phase at another position."""
    first, second, third = (
        LedgerPhase.of(training.sources, 7, begin=begin, data=data)
        for begin, data in ((0, "a"), (8, "b"), (20, "c"))
    )
    LedgerMetadata(seed=1, phases=(first, second)).write(tmp_path)
    unknown = (LedgerPhase(begin=0, data="a"), LedgerPhase(begin=12, data="b"), third)
    LedgerMetadata(seed=1, phases=unknown).write(tmp_path)
    phases = LedgerMetadata.read(tmp_path).phases
    assert phases == (first, replace(second, begin=12), third)


def test_truncate_after_a_step(training: SimulatedTraining) -> None:
    training.train(5)
    with closing(
        Ledger.open(
            training.folder,
            rank=0,
            world_size=1,
            micro_batch_size=MICRO_BATCH_SIZE,
            resumed_step=5,
        )
    ) as ledger:
        ledger.truncate_after(2)
        assert recorded_steps(training.folder) == [1, 2]
        ledger.add(3, 0, GLOBAL_BATCH_SIZE, [batch_of([1])])
    assert recorded_steps(training.folder) == [1, 2, 3]


def test_full_disk(training: SimulatedTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(
        Ledger.open(training.folder, rank=0, world_size=1, micro_batch_size=2, resumed_step=0)
    ) as ledger:
        monkeypatch.setattr(ledger_module.os, "write", lambda fd, data: len(data) // 2)
        with pytest.raises(
            StorageError, match=r"disk is full: .*\d+ of \d+ bytes .*rank-00000.ledger"
        ):
            ledger.add(1, 0, 2, [batch_of([1, 2])])

    training.folder.joinpath("file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write the ledger .*data.ledger=false"):
        Ledger.open(
            training.folder / "file", rank=0, world_size=1, micro_batch_size=2, resumed_step=0
        )


def test_size_per_sample(training: SimulatedTraining) -> None:
    training.train(1)
    (path,) = rank_files(training.folder).values()
    assert path.stat().st_size == 8 + 44 + 8 * GLOBAL_BATCH_SIZE
