"""What a loader does with samples that are bad, missing or not wanted, and with stores that do not
answer."""

from __future__ import annotations

import itertools
import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from webdataset import TarWriter

from data_pipeline.common.errors import StorageError
from data_pipeline.loading import feed
from data_pipeline.order.plan import Plan
from data_pipeline.samples import RawSample, SampleProblem
from data_pipeline.settings import FilterConfig
from data_pipeline.shards.indexing import index_shards
from data_pipeline.shards.manifest import Manifest, load_index
from data_pipeline.shards.writer import write_shards
from tests.support.loaders import COUNT, FORWARD, STEP, Setup, all_same, take
from tests.support.small_shards import caption, make_shards, samples, settings


def odd_shards(folder: Path, kind: str) -> Manifest:
    """Shards in which something is unusual."""
    if kind == "one shard":
        return make_shards(folder, count=5, samples_per_shard=9)
    if kind == "fewer shards than ranks":
        return make_shards(folder, count=11, samples_per_shard=6)
    if kind == "one sample":
        return make_shards(folder, count=1)
    made = list(samples(33))
    sizes = (30, 3) if kind == "skew" else (12, 21)
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        with TarWriter(str(folder / f"{number}.tar"), encoder=False) as tar:
            for sample in made[sum(sizes[:number]) :][:size]:
                tar.write(sample | {"txt": str(sample["txt"]).encode()})
    if kind == "an empty shard":
        for name in ("00", "05", "z"):  # before, between and after the others
            with tarfile.open(folder / f"{name}.tar", "w"):
                pass
    if kind == "a shard of bad samples":
        made = [sample | {"png": b"no picture"} for sample in made[:12]]
        with TarWriter(str(folder / "0.tar"), encoder=False) as tar:
            for sample in made:
                tar.write(sample | {"txt": str(sample["txt"]).encode()})
    return index_shards(str(folder))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    "kind",
    [
        "one shard",
        "one sample",
        "fewer shards than ranks",
        "skew",
        "an empty shard",
        "a shard of bad samples",
    ],
)
def test_odd_shards_give_all_ranks_as_many_batches(
    tmp_path: Path, tokenizer_path: str, kind: str, world_size: int
) -> None:
    manifest = odd_shards(tmp_path / "shards", kind)
    total = manifest.total_samples
    steps = 3 * total  # that is 3 x STEP / 1 epochs, whatever the number of samples
    setup = Setup(manifest, tokenizer_path)
    ranks = [
        take(setup.open(rank=rank, world_size=world_size), steps)[0] for rank in range(world_size)
    ]
    assert [len(step) for found in ranks for step in found] == [
        STEP // FORWARD // world_size
    ] * steps * world_size
    batches = [batch for found in ranks for step in found for batch in step]
    seen = Counter(number for batch in batches for number in batch.ids.tolist())
    bad = Counter(problem.id for batch in batches for problem in batch.problems)
    assert seen + bad == Counter(dict.fromkeys(range(total), 3 * STEP))
    assert len(bad) == (12 if kind == "a shard of bad samples" else 0)
    assert list(setup.evaluate(rank=0, world_size=world_size))  # one pass does not mind either


def test_filtered_samples_are_counted_apart(setup: Setup) -> None:
    longest = max(len(caption(number)) for number in range(COUNT))
    data = settings(filters=FilterConfig(max_caption_chars=longest - 1))
    batches = [batch for step in take(setup.open(data=data), 15)[0] for batch in step]
    problems = [problem for batch in batches for problem in batch.problems]
    expected = sum(len(caption(number)) == longest for number in range(COUNT))
    assert len(problems) == 4 * expected
    assert all(problem.is_filtered and problem.id == int(problem.key) for problem in problems)
    assert len(batches[0].images) + len(batches[0].problems) == FORWARD
    # A held-out set stays whole.
    assert sum(len(batch.keys) for batch in setup.evaluate(data=data)) == COUNT


def bad_shards(folder: Path) -> Manifest:
    """30 samples of which five are bad, each in its own way."""
    made = list(samples(COUNT))
    del made[3]["txt"]
    made[5]["txt"] = " \u200b\n"
    made[11] = {"__key__": "00011", "jpg": b"this is no picture", "txt": "a caption"}
    made[17] = {"__key__": "00017", "txt": "no picture"}
    manifest = write_shards(made, folder, samples_per_shard=7)
    path = folder / manifest.shards[3].name
    data = bytearray(path.read_bytes())
    data[700] ^= 1  # in the picture of sample 21
    path.write_bytes(data)
    return manifest


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_left_out_and_named(
    tmp_path: Path, tokenizer_path: str, workers: int
) -> None:
    setup = Setup(bad_shards(tmp_path), tokenizer_path)
    data = settings(workers=workers)
    batches = [batch for step in take(setup.open(data=data, position=0), 15)[0] for batch in step]
    read = [batch for batch in batches for _ in batch.keys + tuple(p.key for p in batch.problems)]
    assert len(read) == 15 * STEP == 4 * COUNT  # four epochs: nothing vanished
    problems = [problem for batch in batches for problem in batch.problems]
    assert all(problem.id == int(problem.key) for problem in problems)
    assert sorted({(problem.key, problem.shard, problem.reason) for problem in problems}) == [
        ("00003", "shard-000000.tar", "no-caption"),
        ("00005", "shard-000000.tar", "no-caption"),
        ("00011", "shard-000001.tar", "bad-image"),
        ("00017", "shard-000002.tar", "no-image"),
        ("00021", "shard-000003.tar", "crc-mismatch"),
    ]
    assert len(problems) == 4 * 5
    assert all(problem.detail for problem in problems)
    for batch in batches:
        assert (
            len(batch.images)
            == len(batch.text_ids)
            == len(batch.keys)
            == FORWARD - len(batch.problems)
        )
        assert batch.ids.tolist() == [int(key) for key in batch.keys]


@pytest.mark.parametrize("workers", [0, 2])
def test_slots_are_the_rows_that_were_asked_for(
    tmp_path: Path, tokenizer_path: str, workers: int
) -> None:
    """A bad sample leaves a gap, and those after it keep their rows: routing makes its groups of
    them."""
    made = list(samples(12))
    for number in (1, 4, 11):  # a middle one, the first and the last of a batch of four
        made[number]["png"] = b"no picture"
    setup = Setup(write_shards(made, tmp_path, samples_per_shard=12), tokenizer_path)
    in_order = list(setup.evaluate(workers=workers))
    assert [batch.slots.tolist() for batch in in_order] == [[0, 2, 3], [1, 2, 3], [0, 1, 2]]
    assert [batch.ids.tolist() for batch in in_order] == [[0, 2, 3], [5, 6, 7], [8, 9, 10]]
    steps, _ = take(setup.open(data=settings(workers=workers)), 6)
    asked = [
        f"{ref.sample:05d}" for ref in Plan([12], 9, settings().shuffle_window).samples(0, 6 * STEP)
    ]
    gaps = 0
    for number, batch in enumerate(itertools.chain(*steps)):
        mine = asked[number * FORWARD : (number + 1) * FORWARD]
        assert batch.slots.tolist() == [row for row, key in enumerate(mine) if key in batch.keys]
        gaps += batch.slots.tolist() == [1]
    assert gaps  # here only the second of two is left


def test_a_batch_of_bad_samples_only_is_empty(tmp_path: Path, tokenizer_path: str) -> None:
    manifest = write_shards([{"__key__": str(n), "txt": "x"} for n in range(4)], tmp_path)
    (batch,) = Setup(manifest, tokenizer_path).evaluate()
    assert (batch.images.shape, batch.text_ids.shape) == ((0, 3, 8, 8), (0, 8))
    assert len(batch.text_positions) == len(batch.caption_hashes) == 0
    assert len(batch.problems) == 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "reasons"),
    [
        ("missing", {"missing-shard": 7}),
        ("cut", {"truncated": 4}),
        ("index", {"bad-index": 7}),
        ("other index", {"bad-index": 7}),
        ("zeros", {"crc-mismatch": 7}),
        ("longer", {}),
    ],
)
def test_of_a_damaged_shard_each_sample_is_named(
    tmp_path: Path, tokenizer_path: str, workers: int, damage: str, reasons: dict[str, int]
) -> None:
    manifest = make_shards(tmp_path, count=COUNT)
    entry = manifest.shards[2]
    path, index = tmp_path / entry.name, tmp_path / entry.index
    match damage:
        case "missing":
            path.unlink()
        case "cut":
            os.truncate(path, int(load_index(manifest, entry).offsets[3]) + 1000)
        case "zeros":
            path.write_bytes(bytes(entry.bytes))
        case "longer":
            path.write_bytes(path.read_bytes() + b"more")
        case "index":
            index.unlink()
        case "other index":
            index.write_bytes((tmp_path / manifest.shards[1].index).read_bytes())
    ranks = [
        take(
            Setup(manifest, tokenizer_path).open(
                data=settings(workers=workers), rank=rank, world_size=2
            ),
            15,
        )[0]
        for rank in range(2)
    ]
    assert [len(step) for steps in ranks for step in steps] == [
        STEP // FORWARD // 2
    ] * 30  # no rank has more or fewer
    batches = [batch for steps in ranks for step in steps for batch in step]
    ids = Counter(number for batch in batches for number in batch.ids.tolist())
    problems = Counter(
        (problem.id, problem.reason) for batch in batches for problem in batch.problems
    )
    assert Counter(reason for (_, reason) in problems) == reasons
    assert {shard for batch in batches for shard in [p.shard for p in batch.problems]} <= {
        entry.name
    }
    assert ids + Counter({number: count for (number, _), count in problems.items()}) == Counter(
        list(range(COUNT)) * 4
    )
    assert all(14 <= number < 21 for number, _ in problems)


def test_a_store_of_which_nothing_comes_is_waited_for(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage must neither use up the data nor end the run at once."""
    expected = take(setup.open(), 3)[0]
    monkeypatch.setattr(feed, "ASK_AGAIN_SECONDS", 0.01)
    real, asked, forgotten = feed.Reader.read_many, [0], [0]

    def read_many(
        reader: feed.Reader, places: list[tuple[int, int]]
    ) -> list[RawSample | SampleProblem]:
        asked[0] += 1
        if 2 <= asked[0] <= 4:
            return [SampleProblem("shard", "key", "unreachable", "no route") for _ in places]
        return real(reader, places)

    monkeypatch.setattr(feed.Reader, "read_many", read_many)
    monkeypatch.setattr(
        feed.Reader, "forget_troubles", lambda reader: forgotten.__setitem__(0, forgotten[0] + 1)
    )
    assert all_same(take(setup.open(), 3)[0], expected)
    assert forgotten == [3]


def test_a_store_that_stays_away_ends_the_run(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "ASK_AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(feed.Reader, "forget_troubles", lambda reader: None)
    monkeypatch.setattr(
        feed.Reader,
        "read_many",
        lambda reader, places: [
            SampleProblem("shard", "key", "unreachable", "the store refused") for _ in places
        ],
    )
    with pytest.raises(
        StorageError, match=r"not one sample of a whole batch .*: the store refused. Look"
    ):
        take(setup.open(data=settings(shard_seconds=0.2, timeout_seconds=0.6)), 1)
