"""The loader with corrupt, missing and filtered samples, and with stores that do not respond."""

from __future__ import annotations

import itertools
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from webdataset import TarWriter

from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.content.sample_processor import SampleProcessor
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading import batch_reader
from data_pipeline.order.plan import Plan
from data_pipeline.reading.reader import Reader
from data_pipeline.samples import Batch, ProcessedSample, RawSample, SampleProblem, SampleRef
from data_pipeline.settings import FilterConfig
from data_pipeline.shards.indexing import index_shards
from data_pipeline.shards.manifest import Manifest, load_index
from data_pipeline.shards.writer import write_shards
from tests.support.loaders import (
    GLOBAL_BATCH_SIZE,
    MICRO_BATCH_SIZE,
    NUM_SAMPLES,
    LoaderFactory,
    steps_equal,
    take_steps,
)
from tests.support.small_shards import make_caption, make_data_config, make_samples, make_shards


def flatten(steps: Sequence[Sequence[Batch]]) -> list[Batch]:
    return [batch for step in steps for batch in step]


def write_tar(path: Path, samples: Sequence[dict[str, object]]) -> None:
    with TarWriter(str(path), encoder=False) as tar:
        for sample in samples:
            tar.write(sample | {"txt": str(sample["txt"]).encode()})


def make_unusual_shards(folder: Path, kind: str) -> Manifest:
    if kind == "one shard":
        return make_shards(folder, count=5, samples_per_shard=9)
    if kind == "fewer shards than ranks":
        return make_shards(folder, count=11, samples_per_shard=6)
    if kind == "one sample":
        return make_shards(folder, count=1)

    samples = list(make_samples(33))
    first_size = 30 if kind == "different sizes" else 12
    folder.mkdir(parents=True)
    write_tar(folder / "0.tar", samples[:first_size])
    write_tar(folder / "1.tar", samples[first_size:])
    if kind == "empty shards":
        for name in ("00", "05", "z"):  # before, between and after the others
            with tarfile.open(folder / f"{name}.tar", "w"):
                pass
    if kind == "a shard of corrupt samples":
        write_tar(
            folder / "0.tar", [sample | {"png": b"no image"} for sample in samples[:first_size]]
        )
    return index_shards(str(folder))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    "kind",
    [
        "one shard",
        "one sample",
        "fewer shards than ranks",
        "different sizes",
        "empty shards",
        "a shard of corrupt samples",
    ],
)
def test_unusual_shards_give_every_rank_the_same_number_of_batches(
    tmp_path: Path, tokenizer: Tokenizer, kind: str, world_size: int
) -> None:
    manifest = make_unusual_shards(tmp_path / "shards", kind)
    total = manifest.total_samples
    num_steps = 3 * total  # 3 x GLOBAL_BATCH_SIZE epochs, whatever the number of samples
    factory = LoaderFactory(manifest, tokenizer)
    steps = []
    for rank in range(world_size):
        steps += take_steps(factory.open(rank=rank, world_size=world_size), num_steps)[0]

    micro_batches = GLOBAL_BATCH_SIZE // MICRO_BATCH_SIZE // world_size
    assert [len(step) for step in steps] == [micro_batches] * num_steps * world_size

    batches = flatten(steps)
    delivered = Counter(sample for batch in batches for sample in batch.ids.tolist())
    corrupt = Counter(problem.id for batch in batches for problem in batch.problems)
    expected = dict.fromkeys(range(total), 3 * GLOBAL_BATCH_SIZE)
    assert delivered + corrupt == Counter(expected)
    assert len(corrupt) == (12 if kind == "a shard of corrupt samples" else 0)
    assert list(factory.evaluate(rank=0, world_size=world_size))


def test_filtered_samples(factory: LoaderFactory) -> None:
    lengths = [len(make_caption(i)) for i in range(NUM_SAMPLES)]
    data = make_data_config(filters=FilterConfig(max_caption_chars=max(lengths) - 1))
    batches = flatten(take_steps(factory.open(data=data), 15)[0])
    problems = [problem for batch in batches for problem in batch.problems]
    assert len(problems) == 4 * lengths.count(max(lengths))
    assert all(problem.is_filtered and problem.id == int(problem.key) for problem in problems)
    assert len(batches[0].images) + len(batches[0].problems) == MICRO_BATCH_SIZE

    # Filters do not apply to evaluation.
    assert sum(len(batch.keys) for batch in factory.evaluate(data=data)) == NUM_SAMPLES


def make_corrupt_samples(folder: Path) -> Manifest:
    """30 samples of which five are corrupt, each in another way."""
    samples = list(make_samples(NUM_SAMPLES))
    del samples[3]["txt"]
    samples[5]["txt"] = " \u200b\n"
    samples[11] = {"__key__": "00011", "jpg": b"this is no image", "txt": "a caption"}
    samples[17] = {"__key__": "00017", "txt": "no image"}
    manifest = write_shards(samples, folder, samples_per_shard=7)
    path = folder / manifest.shards[3].name
    data = bytearray(path.read_bytes())
    data[700] ^= 1  # in the image of sample 21
    path.write_bytes(data)
    return manifest


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_samples_are_reported(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    factory = LoaderFactory(make_corrupt_samples(tmp_path), tokenizer)
    data = make_data_config(workers=workers)
    batches = flatten(take_steps(factory.open(data=data, position=0), 15)[0])
    num_samples = sum(len(batch.keys) + len(batch.problems) for batch in batches)
    assert num_samples == 15 * GLOBAL_BATCH_SIZE == 4 * NUM_SAMPLES  # four epochs

    problems = [problem for batch in batches for problem in batch.problems]
    assert all(problem.id == int(problem.key) for problem in problems)
    assert sorted({(problem.key, problem.shard, problem.reason) for problem in problems}) == [
        ("00003", "shard-000000.tar", "no-caption"),
        ("00005", "shard-000000.tar", "no-caption"),
        ("00011", "shard-000001.tar", "corrupt-image"),
        ("00017", "shard-000002.tar", "no-image"),
        ("00021", "shard-000003.tar", "crc-mismatch"),
    ]
    assert len(problems) == 4 * 5
    assert all(problem.detail for problem in problems)

    for batch in batches:
        assert len(batch.images) == len(batch.text_ids) == len(batch.keys)
        assert len(batch.keys) == MICRO_BATCH_SIZE - len(batch.problems)
        assert batch.ids.tolist() == [int(key) for key in batch.keys]


@pytest.mark.parametrize("workers", [0, 2])
def test_slots(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    """A corrupt sample leaves a gap, and the samples after it keep their slots, which determine the
    capacity groups of the router."""
    samples = list(make_samples(12))
    for i in (1, 4, 11):  # a middle one, the first and the last of a batch of four
        samples[i]["png"] = b"no image"
    factory = LoaderFactory(write_shards(samples, tmp_path, samples_per_shard=12), tokenizer)
    batches = list(factory.evaluate(workers=workers))
    assert [batch.slots.tolist() for batch in batches] == [[0, 2, 3], [1, 2, 3], [0, 1, 2]]
    assert [batch.ids.tolist() for batch in batches] == [[0, 2, 3], [5, 6, 7], [8, 9, 10]]

    steps, _ = take_steps(factory.open(data=make_data_config(workers=workers)), 6)
    plan = Plan([12], 9, make_data_config().shuffle_window)
    requested = [f"{ref.sample:05d}" for ref in plan.samples(0, 6 * GLOBAL_BATCH_SIZE)]
    num_gaps = 0
    for index, batch in enumerate(itertools.chain(*steps)):
        keys = requested[index * MICRO_BATCH_SIZE : (index + 1) * MICRO_BATCH_SIZE]
        assert batch.slots.tolist() == [row for row, key in enumerate(keys) if key in batch.keys]
        num_gaps += batch.slots.tolist() == [1]
    assert num_gaps  # batches with only the second of two samples


def test_batch_of_corrupt_samples_only(tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifest = write_shards([{"__key__": str(i), "txt": "x"} for i in range(4)], tmp_path)
    (batch,) = LoaderFactory(manifest, tokenizer).evaluate()
    assert (batch.images.shape, batch.text_ids.shape) == ((0, 3, 8, 8), (0, 8))
    assert len(batch.text_positions) == len(batch.caption_hashes) == 0
    assert len(batch.problems) == 4


def test_error_of_the_whole_run(factory: LoaderFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error without a slug ends the run: every sample would have it."""

    def fails(*_: object) -> ProcessedSample:
        raise DataError("the tokenizer is unusable")

    monkeypatch.setattr(SampleProcessor, "process", fails)
    with pytest.raises(DataError, match="the tokenizer is unusable"):
        take_steps(factory.open(), 1)


def corrupt_shard(manifest: Manifest, folder: Path, corruption: str) -> None:
    """Corrupt the third shard."""
    entry = manifest.shards[2]
    path, index = folder / entry.name, folder / entry.index
    match corruption:
        case "missing":
            path.unlink()
        case "truncated":
            os.truncate(path, int(load_index(manifest, entry).offsets[3]) + 1000)
        case "zeros":
            path.write_bytes(bytes(entry.bytes))
        case "longer":
            path.write_bytes(path.read_bytes() + b"more")
        case "missing index":
            index.unlink()
        case "index of another shard":
            index.write_bytes((folder / manifest.shards[1].index).read_bytes())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("corruption", "reasons"),
    [
        ("missing", {"missing-shard": 7}),
        ("truncated", {"truncated": 4}),
        ("missing index", {"corrupt-index": 7}),
        ("index of another shard", {"corrupt-index": 7}),
        ("zeros", {"crc-mismatch": 7}),
        ("longer", {}),
    ],
)
def test_every_sample_of_a_corrupt_shard_is_reported(
    tmp_path: Path, tokenizer: Tokenizer, workers: int, corruption: str, reasons: dict[str, int]
) -> None:
    manifest = make_shards(tmp_path, count=NUM_SAMPLES)
    corrupt_shard(manifest, tmp_path, corruption)
    factory = LoaderFactory(manifest, tokenizer)
    data = make_data_config(workers=workers)
    steps = []
    for rank in range(2):
        steps += take_steps(factory.open(data=data, rank=rank, world_size=2), 15)[0]
    assert [len(step) for step in steps] == [GLOBAL_BATCH_SIZE // MICRO_BATCH_SIZE // 2] * 30

    batches = flatten(steps)
    problems = [problem for batch in batches for problem in batch.problems]
    delivered = Counter(sample for batch in batches for sample in batch.ids.tolist())
    not_delivered = Counter(problem.id for problem in problems)
    assert delivered + not_delivered == Counter(list(range(NUM_SAMPLES)) * 4)

    distinct = {(problem.id, problem.reason) for problem in problems}
    assert Counter(reason for _, reason in distinct) == reasons
    assert all(14 <= sample < 21 for sample, _ in distinct)
    assert {problem.shard for problem in problems} <= {manifest.shards[2].name}


def test_unreachable_store_is_tried_again(
    factory: LoaderFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage must neither consume the data nor end the run at once."""
    expected = take_steps(factory.open(), 3)[0]
    monkeypatch.setattr(batch_reader, "STORE_RETRY_SECONDS", 0.01)
    read_many, calls, clears = Reader.read_many, itertools.count(1), itertools.count()

    def unreachable_at_first(
        reader: Reader, refs: Sequence[SampleRef]
    ) -> list[RawSample | SampleProblem]:
        if 2 <= next(calls) <= 4:
            return [SampleProblem("shard", "key", "unreachable", "no route") for _ in refs]
        return read_many(reader, refs)

    monkeypatch.setattr(Reader, "read_many", unreachable_at_first)
    monkeypatch.setattr(Reader, "clear_failures", lambda reader: next(clears))
    assert steps_equal(take_steps(factory.open(), 3)[0], expected)
    assert next(clears) == 3


def test_store_that_stays_unreachable(
    factory: LoaderFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_reader, "STORE_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(Reader, "clear_failures", lambda reader: None)
    monkeypatch.setattr(
        Reader,
        "read_many",
        lambda reader, refs: [
            SampleProblem("shard", "key", "unreachable", "the store refused") for _ in refs
        ],
    )
    with pytest.raises(StorageError, match=r"no sample .*: the store refused.*credentials"):
        take_steps(factory.open(data=make_data_config(shard_seconds=0.2, timeout_seconds=0.6)), 1)
