"""The ledger: what it proves, what a crash leaves of it, and every way in which it can be wrong."""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.commands import ledger as command
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.loading import ledger as ledger_file
from data_pipeline.loading.ledger import Ledger, rank_file, rank_files, read_records
from data_pipeline.loading.ledger_check import LedgerReport, check_ledger
from data_pipeline.loading.ledger_facts import LedgerFacts
from data_pipeline.loading.loader import Loader
from data_pipeline.loading.schedules import TrainSchedule, shard_starts
from data_pipeline.loading.sources import Source, data_fingerprint, make_order, open_sources
from data_pipeline.order.state import LoaderState
from data_pipeline.samples import Batch, SampleProblem
from data_pipeline.settings import FilterConfig, SourceConfig
from data_pipeline.shards.manifest import Manifest
from tests.support.http_server import http_server
from tests.support.small_shards import caption, make_shards, make_tokenizer, settings

SEED, WINDOW, STEP, FORWARD = 4, 2, 16, 2
BAD_SAMPLE, FILTERED_SAMPLE = 5, 9


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    return [
        make_shards(folders[0], count=19),
        make_shards(folders[1], count=9, samples_per_shard=4),
    ]


@dataclass
class Training:
    """A run that reads nothing, but records what it would have read."""

    sources: tuple[Source, ...]
    folder: Path
    state: LoaderState = field(default_factory=lambda: LoaderState(seed=SEED))
    steps: int = 0

    def __post_init__(self) -> None:
        self.order = make_order(self.sources, SEED, WINDOW)
        self.starts = shard_starts([source.manifest for source in self.sources])
        self.state = replace(self.state, data=data_fingerprint(self.sources, WINDOW))

    def go(self, steps: int, world_size: int = 1) -> None:
        """Train a few steps from the last checkpoint on."""
        facts = LedgerFacts.of(self.sources, WINDOW, self.state)
        micro_batches = STEP // FORWARD // world_size
        ledgers = [
            Ledger.open(
                self.folder,
                rank=rank,
                world_size=world_size,
                micro_batch_size=FORWARD,
                resumed_step=self.steps,
                facts=facts,
            )
            for rank in range(world_size)
        ]
        schedules = [
            TrainSchedule(
                order=self.order,
                origin=self.state.position,
                skip=self.state.skip,
                global_batch_size=STEP,
                micro_batch_size=FORWARD,
                micro_batches=micro_batches,
                rank=rank,
                world_size=world_size,
            )
            for rank in range(world_size)
        ]
        before = self.state.position
        for step in range(steps):
            after = schedules[0].step_end(step)
            for ledger, schedule in zip(ledgers, schedules, strict=True):
                numbers = range(step * micro_batches, (step + 1) * micro_batches)
                ledger.add(
                    self.steps + step + 1,
                    before,
                    after,
                    [self.batch(schedule, number) for number in numbers],
                )
            before = after
        for ledger in ledgers:
            ledger.sync()
            ledger.close()
        self.position_reached = before

    def save(self, steps: int) -> None:
        """A checkpoint after the last `go`."""
        self.steps += steps
        self.state = replace(self.state, position=self.position_reached)

    def batch(self, schedule: TrainSchedule, number: int) -> Batch:
        ids = [int(self.starts[ref.shard]) + ref.sample for ref in schedule.refs(number)]
        return batch_of(ids)

    def check(self) -> LedgerReport:
        return check_ledger(
            self.folder, self.order, self.starts, LedgerFacts.read(self.folder).skip
        )


def batch_of(ids: Sequence[int]) -> Batch:
    reasons = {BAD_SAMPLE: "bad-image", FILTERED_SAMPLE: "filter:min-side"}
    problems = tuple(SampleProblem("s", "k", reasons[n], "d", n) for n in ids if n in reasons)
    good = torch.tensor([n for n in ids if n not in reasons], dtype=torch.int64)
    none = torch.empty(0)
    return Batch(none, none, none, none, none, (), (), problems, 0.0, good)


@pytest.fixture
def training(manifests: list[Manifest], tmp_path: Path) -> Training:
    configs = [
        SourceConfig(shards=manifest.url, weight=weight)
        for manifest, weight in zip(manifests, (3.0, 1.0), strict=True)
    ]
    sources = tuple(Source(manifest=m, config=c) for m, c in zip(manifests, configs, strict=True))
    return Training(sources, tmp_path / "ledger")


def check_by_command(folder: Path) -> int:
    return command.handle(argparse.Namespace(folder=folder, data=""))


def test_an_unbroken_run_is_proved(training: Training, capsys: pytest.CaptureFixture[str]) -> None:
    training.go(7, world_size=2)
    report = training.check()
    assert report.is_whole, report.problems
    assert (report.steps, report.samples, report.end, report.worlds) == (7, 7 * STEP, 7 * STEP, [2])
    ids = [
        int(training.starts[ref.shard]) + ref.sample for ref in training.order.samples(0, 7 * STEP)
    ]
    assert (report.bad, report.filtered) == (ids.count(BAD_SAMPLE), ids.count(FILTERED_SAMPLE))
    assert report.bad > 0
    assert report.filtered > 0
    assert check_by_command(training.folder) == check_by_command(training.folder.parent) == 0
    out = capsys.readouterr().out
    assert "every step got exactly the samples of the order" in out
    assert "lost                 0" in out


def test_restarts_with_other_worlds_are_proved(training: Training) -> None:
    """Two steps beyond each checkpoint are done again; ranks come and go."""
    for world_size in (1, 2, 4, 1, 8, 2):
        training.go(5, world_size)
        training.go(3, world_size)
        training.save(3)
    training.go(2, world_size=1)
    report = training.check()
    assert report.is_whole, report.problems
    assert report.steps == 20
    assert report.worlds == [1, 2, 4, 1, 8, 2, 1]
    assert len(rank_files(training.folder)) == 8


def test_files_of_ranks_that_are_no_more_are_taken_back(training: Training) -> None:
    training.go(6, world_size=4)
    training.go(2, world_size=1)  # from the start again
    assert [len(list(read_records(training.folder / rank_file(rank)))) for rank in range(4)] == [
        2,
        0,
        0,
        0,
    ]
    assert training.check().is_whole


def test_a_jump_over_positions_is_proved(training: Training) -> None:
    training.go(3, world_size=2)
    training.save(3)
    training.state = training.state.skipping(4 * STEP, 5 * STEP + 3)
    training.go(4, world_size=2)
    report = training.check()
    assert report.is_whole, report.problems
    assert report.end == 8 * STEP + 3
    # Without the jump the same ledger is wrong.
    assert check_ledger(training.folder, training.order, training.starts).lost > 0


def test_half_a_record_is_dropped_at_every_cut(training: Training) -> None:
    training.go(3)
    path = training.folder / rank_file(0)
    whole = path.read_bytes()
    size = (len(whole) - 8) // 3
    for cut in (*range(9), *range(8 + 2 * size, len(whole), 7), len(whole) - 1):
        path.write_bytes(whole[:cut])
        kept = max(0, cut - 8) // size
        assert [record.step for record in read_records(path)] == list(range(1, kept + 1))
        # The next start takes it away, and goes on behind it.
        fd = ledger_file._open_trimmed(path, 3)
        assert os.lseek(fd, 0, os.SEEK_CUR) == os.fstat(fd).st_size == 8 + kept * size
        os.close(fd)


def test_a_power_cut_that_leaves_zeros_is_half_a_record(training: Training) -> None:
    training.go(3)
    path = training.folder / rank_file(0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + bytes(40))
    assert len(list(read_records(path))) == 2
    path.write_bytes(whole + bytes(100))
    assert len(list(read_records(path))) == 3


def test_damage_in_the_middle_is_told(training: Training) -> None:
    training.go(3)
    path = training.folder / rank_file(0)
    data = bytearray(path.read_bytes())
    for place in (10, 60, len(data) // 2):
        broken = bytearray(data)
        broken[place] ^= 4
        path.write_bytes(broken)
        with pytest.raises(
            DataError, match=r"rank-00000.ledger is damaged at byte \d+: it has more records"
        ):
            training.check()
    path.write_bytes(b"something else")
    with pytest.raises(DataError, match="is not a ledger"):
        training.check()
    with pytest.raises(StorageError, match=r"is not a ledger.*move it away"):
        training.go(1)


def rewritten(training: Training, change: object) -> None:
    """Write rank 0's file again, with its records changed by `change`."""
    path = training.folder / rank_file(0)
    records = list(read_records(path))
    path.unlink()
    with closing(
        Ledger.open(training.folder, rank=0, world_size=1, micro_batch_size=FORWARD, resumed_step=0)
    ) as out:
        for record in change(records):  # type: ignore[operator]
            out._world, out._last = record.world_size, record.step - 1
            marked = torch.from_numpy(np.array(record.samples))
            batch = batch_of([])._replace(ids=marked)
            out.add(record.step, record.before, record.after, [batch])


def swap(
    records: list[ledger_file.Record], step: int, first: int, second: int
) -> list[ledger_file.Record]:
    samples = records[step].samples.copy()
    samples[[first, second]] = samples[[second, first]]
    records[step] = records[step]._replace(samples=samples)
    return records


def put(
    records: list[ledger_file.Record], step: int, place: int, number: int
) -> list[ledger_file.Record]:
    samples = records[step].samples.copy()
    samples[place] = number
    records[step] = records[step]._replace(samples=samples)
    return records


@pytest.mark.parametrize(
    ("change", "lost", "surplus", "message"),
    [
        (lambda r: put(r, 1, 3, 27), 1, 1, r"step 2: 1 samples lost \(\d+\), 1 too many \(27\)"),
        (lambda r: put(r, 1, 3, int(r[1].ids[4])), 1, 1, "step 2: 1 samples lost"),
        (
            lambda r: [r[0], r[1]._replace(samples=r[1].samples[:-1]), r[2]],
            1,
            0,
            "step 2: 1 samples lost",
        ),
        (
            lambda r: [r[0], r[1]._replace(samples=np.append(r[1].samples, 3)), r[2]],
            0,
            1,
            "0 samples.*1 too many",
        ),
        (lambda r: swap(r, 2, 0, 5), 0, 0, "step 3: all samples are there, but not where"),
        (lambda r: swap(r, 2, 6, 7), 0, 0, "step 3: all samples are there, but not where"),
        (lambda r: [r[0], r[2]], STEP, 0, "step 2 is missing"),
        (
            lambda r: [r[0], r[1], r[2]._replace(before=r[2].before + 1, after=r[2].after + 1)],
            2,
            1,
            "step 3 begins at",
        ),
        (lambda r: [r[0]._replace(world_size=2), *r[1:]], 0, 0, r"nothing from rank\(s\) 1 of 2"),
        (
            lambda r: [r[0], r[1]._replace(after=r[1].after + 2), r[2]],
            2,
            0,
            "step 2: 2 samples lost",
        ),
        (lambda r: [], 0, 0, "holds no step"),
    ],
)
def test_every_kind_of_error_is_told(
    training: Training,
    capsys: pytest.CaptureFixture[str],
    change: object,
    lost: int,
    surplus: int,
    message: str,
) -> None:
    training.go(3)
    rewritten(training, change)
    report = training.check()
    assert not report.is_whole
    assert (report.lost, report.surplus) == (lost, surplus)
    assert re.search(message, "\n".join(report.problems)), report.problems
    assert check_by_command(training.folder) == 1
    assert re.search(message, capsys.readouterr().out)


def test_a_rank_without_a_file_is_told(training: Training) -> None:
    training.go(2, world_size=2)
    (training.folder / rank_file(1)).unlink()
    report = training.check()
    assert not report.is_whole
    assert report.lost == STEP
    (training.folder / rank_file(0)).unlink()
    with pytest.raises(DataError, match=r"there is no ledger in .*data.ledger=true"):
        training.check()


def test_a_ledger_that_was_switched_on_later_says_so(
    training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    training.position_reached = 4 * STEP
    training.save(4)
    training.go(3)
    report = training.check()
    assert report.is_whole, report.problems
    assert (report.first_step, report.steps, report.begin) == (5, 3, 4 * STEP)
    assert check_by_command(training.folder) == 0
    assert "5 to 7; nothing is known of those before" in capsys.readouterr().out


def test_the_facts_are_a_value(training: Training, tmp_path: Path) -> None:
    source = replace(
        training.sources[0],
        config=SourceConfig(shards="s3://b/x", weight_schedule=((0, 1.0), (5, 2.5))),
    )
    facts = LedgerFacts.of([source], 7, LoaderState(seed=3, data="f", skip=((1, 5), (7, 9))))
    facts.write(tmp_path)
    assert LedgerFacts.read(tmp_path) == facts
    assert facts.manifests == ("s3://b/x",)
    near = replace(source, config=SourceConfig(shards="shards", drop="drop.json"))
    there = LedgerFacts.of([near], 7, LoaderState())  # a person may ask from another folder
    assert (there.manifests, there.sources[0].drop) == (
        (f"{Path.cwd()}/shards",),
        f"{Path.cwd()}/drop.json",
    )
    (tmp_path / "ledger.json").write_text("{}")
    with pytest.raises(DataError, match="does not describe a ledger: expected version 1"):
        LedgerFacts.read(tmp_path)


def test_other_data_cannot_be_compared(
    training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training.go(1)
    facts = LedgerFacts.read(training.folder)
    replace(facts, shuffle_window=3).write(training.folder)
    with pytest.raises(DataError, match=r"not those that .* was kept for"):
        check_by_command(training.folder)
    with pytest.raises(DataError, match="there is no ledger in"):
        check_by_command(tmp_path / "nowhere")


def test_steps_are_taken_back_without_a_restart(training: Training) -> None:
    training.go(5)
    with closing(
        Ledger.open(training.folder, rank=0, world_size=1, micro_batch_size=FORWARD, resumed_step=5)
    ) as out:
        out.take_back(2)
        assert [record.step for record in read_records(training.folder / rank_file(0))] == [1, 2]
        out.add(3, 0, STEP, [batch_of([1])])
    assert [record.step for record in read_records(training.folder / rank_file(0))] == [1, 2, 3]


def test_a_full_disk_is_a_clear_error(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(
        Ledger.open(training.folder, rank=0, world_size=1, micro_batch_size=2, resumed_step=0)
    ) as out:
        monkeypatch.setattr(ledger_file.os, "write", lambda fd, data: len(data) // 2)
        with pytest.raises(
            StorageError, match=r"the disk is full: .*rank-00000.ledger took \d+ of \d+ bytes"
        ):
            out.add(1, 0, 2, [batch_of([1, 2])])
    training.folder.joinpath("file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write the ledger .*data.ledger=false"):
        Ledger.open(
            training.folder / "file", rank=0, world_size=1, micro_batch_size=2, resumed_step=0
        )


def records_of(folder: Path) -> Iterator[int]:
    yield from (path.stat().st_size for path in rank_files(folder).values())


def test_it_costs_8_bytes_a_sample(training: Training) -> None:
    training.go(1)
    (size,) = records_of(training.folder)
    assert size == 8 + 44 + 8 * STEP


def test_what_a_loader_delivers_is_proved(manifests: list[Manifest], tmp_path: Path) -> None:
    """Real batches, with bad and filtered samples, cut and resumed on other ranks."""
    damaged = make_shards(tmp_path / "damaged", count=19)
    path = tmp_path / "damaged" / damaged.shards[1].name
    data = bytearray(path.read_bytes())
    data[600] ^= 1  # in the picture of sample 7
    path.write_bytes(data)
    longest = max(len(caption(number)) for number in range(19))
    left_out = [number for number in range(19) if len(caption(number)) == longest and number != 7]
    given = settings(filters=FilterConfig(max_caption_chars=longest - 1))
    tokenizer, folder, state, done = make_tokenizer(tmp_path), tmp_path / "ledger", LoaderState(), 0
    for world_size, steps, kept in ((1, 4, 3), (2, 5, 5), (4, 2, 1), (1, 3, 3)):
        resumed = state
        for rank in range(world_size):
            loader = Loader(
                manifests=[damaged, manifests[1]],
                tokenizer_path=tokenizer,
                data=given,
                image_size=8,
                context_length=16,
                seed=2,
                rank=rank,
                world_size=world_size,
                global_batch_size=8,
                micro_batch_size=2,
                state=resumed,
            )
            facts = LedgerFacts.of(loader.sources, given.shuffle_window, loader.state)
            out = Ledger.open(
                folder,
                rank=rank,
                world_size=world_size,
                micro_batch_size=2,
                resumed_step=done,
                facts=facts,
            )
            with closing(loader), closing(out):
                before = loader.state
                for step, (batches, after) in enumerate(itertools.islice(loader.steps(), steps)):
                    out.add(done + step + 1, before.position, after.position, batches)
                    before = after
                    state = after if step + 1 == kept else state
        done += kept
    assert check_by_command(tmp_path) == 0
    order, starts = loader.order, shard_starts([damaged, manifests[1]])
    report = check_ledger(folder, order, starts)
    assert (report.steps, report.samples, report.worlds) == (12, 96, [1, 2, 4, 1])
    ids = [int(starts[ref.shard]) + ref.sample for ref in order.samples(0, 96)]
    assert (report.bad, report.filtered) == (
        ids.count(7),
        sum(ids.count(number) for number in left_out),
    )
    assert report.bad > 0
    assert report.filtered > 0


def test_signed_addresses_come_from_the_run_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path / "data", count=19)
    with http_server(tmp_path / "data", query="sig=SECRET") as web:
        signed = f"{web.url('manifest.json')}?sig=SECRET"
        training = Training(open_sources([SourceConfig(shards=signed)]), tmp_path / "ledger")
        training.go(1)
        with pytest.raises(StorageError, match="manifest"):
            check_by_command(tmp_path)
        (tmp_path / "run.yaml").write_text(f"data: {{train: ['{signed}']}}\n")
        assert (
            command.handle(argparse.Namespace(folder=tmp_path, data=str(tmp_path / "run.yaml")))
            == 0
        )
    assert "every step got exactly" in capsys.readouterr().out
