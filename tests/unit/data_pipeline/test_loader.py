"""The loader as a trainer sees it: the same samples however it is cut, and bad ones named."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from webdataset import TarWriter

from data_pipeline.common.errors import ConfigError, DataError, StorageError
from data_pipeline.content.captions import caption_hash
from data_pipeline.content.images import decode
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.content.transforms import eval_transform
from data_pipeline.loading import collate, feed
from data_pipeline.loading.collate import BatchRows
from data_pipeline.loading.loader import Loader, read_all
from data_pipeline.loading.sources import Source, data_fingerprint, open_sources
from data_pipeline.order.drop import make_drop_list, write_drop_list
from data_pipeline.order.plan import Plan
from data_pipeline.order.state import LoaderState
from data_pipeline.samples import Batch, RawSample, SampleProblem
from data_pipeline.settings import DataConfig, FilterConfig, SourceConfig
from data_pipeline.shards.indexing import index_shards
from data_pipeline.shards.manifest import Manifest, load_index, load_manifest
from data_pipeline.shards.writer import write_shards
from tests.support.small_shards import caption, make_shards, make_tokenizer, picture, samples, settings

COUNT, STEP, FORWARD = 30, 8, 2


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_shards(tmp_path_factory.mktemp("shards"), count=COUNT)


@dataclasses.dataclass(frozen=True)
class Setup:
    """Opens loaders that differ in few things."""

    manifest: Manifest
    tokenizer: str

    def open(self, *, data: DataConfig | None = None, rank: int = 0, world: int = 1, position: int = 0) -> Loader:
        return self.resume(LoaderState(position=position), data=data, rank=rank, world=world)

    def resume(
        self, state: LoaderState, *, data: DataConfig | None = None, rank: int = 0, world: int = 1, seed: int = 9
    ) -> Loader:
        return Loader(
            manifests=[self.manifest], tokenizer_path=self.tokenizer, data=data or settings(), image_size=8,
            text_length=16, seed=seed, rank=rank, world=world, pairs_per_step=STEP, pairs_per_forward=FORWARD,
            state=state,
        )  # fmt: skip

    def evaluate(self, **more: object) -> Iterator[Batch]:
        arguments: dict[str, object] = {
            "tokenizer": Tokenizer.load(self.tokenizer), "data": settings(), "image_size": 8, "text_length": 16,
            "pairs_per_forward": 4,
        }  # fmt: skip
        return read_all(self.manifest, **(arguments | more))  # type: ignore[arg-type]


@pytest.fixture
def setup(manifest: Manifest, tokenizer_path: str) -> Setup:
    return Setup(manifest, tokenizer_path)


def keys_of(batches: Sequence[Batch]) -> list[str]:
    """Keys of all samples, the bad ones too."""
    return [key for batch in batches for key in (*batch.keys, *(problem.key for problem in batch.problems))]


def take(loader: Loader, steps: int) -> tuple[list[list[Batch]], list[LoaderState]]:
    """The first steps and the states after them."""
    with closing(loader):
        found = list(itertools.islice(loader.steps(), steps))
    return [batches for batches, _ in found], [state for _, state in found]


def same(left: Batch, right: Batch) -> bool:
    tensors = zip((*left[:5], left.ids), (*right[:5], right.ids), strict=True)
    return all(torch.equal(a, b) for a, b in tensors) and left[5:8] == right[5:8]


def all_same(left: list[list[Batch]], right: list[list[Batch]]) -> bool:
    pairs = zip(itertools.chain(*left), itertools.chain(*right), strict=True)
    return all(same(a, b) for a, b in pairs)


def test_steps_follow_the_plan(setup: Setup) -> None:
    steps, states = take(setup.open(), 9)  # two epochs and a bit: steps span epochs
    keys = [key for batches in steps for batch in batches for key in batch.keys]
    plan = Plan([shard.samples for shard in setup.manifest.shards], 9, settings().shuffle_window)
    assert keys == [f"{7 * ref.shard + ref.sample:05d}" for ref in plan.samples(0, 9 * STEP)]
    assert [state.position for state in states] == [STEP * step for step in range(1, 10)]
    assert [len(batches) for batches in steps] == [STEP // FORWARD] * 9
    ids = [number for batches in steps for batch in batches for number in batch.ids.tolist()]
    assert ids == [int(key) for key in keys]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_goes_on_from_every_cut(setup: Setup, workers: int) -> None:
    whole, states = take(setup.open(), 6)
    for cut in range(6):
        state = LoaderState.from_json(states[cut - 1].to_json()) if cut else LoaderState()
        rest, later = take(setup.resume(state, data=settings(workers=workers)), 6 - cut)
        assert all_same(rest, whole[cut:])
        assert later == states[cut:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("cuts", [(1, 1, 1, 1, 2), (3, 3)])
def test_resumes_with_other_ranks_and_workers_give_one_sequence(
    setup: Setup, cuts: tuple[int, ...]
) -> None:
    """Several times within an epoch and beyond: 1, 2, 4 and 1 ranks, 0 to 4 workers."""
    whole, _ = take(setup.open(), sum(cuts))
    state, found = LoaderState(), list[list[Batch]]()
    for cut, world, workers in zip(cuts, (1, 2, 4, 1, 2), (0, 2, 1, 4, 3), strict=False):
        ranks = [take(setup.resume(state, data=settings(workers=workers), rank=rank, world=world), cut)
                 for rank in range(world)]
        assert len({str(states) for _, states in ranks}) == 1
        for step in range(cut):
            rounds = zip(*(steps[step] for steps, _ in ranks), strict=True)
            found.append([batch for round_ in rounds for batch in round_])
        state = LoaderState.from_json(ranks[0][1][-1].to_json())
    assert all_same(found, whole)


def mixture(folder: Path) -> tuple[Source, ...]:
    """Three sources: one with a drop-list, one of weight 0."""
    for name, count, first in (("a", 17, 0), ("b", 9, 17), ("c", 3, 26)):
        made = make_shards(folder / name, count=count, samples_per_shard=4, first=first)
        if name == "a":
            write_drop_list(folder / "drop.json", make_drop_list(made, {0: [1, 2], 4: [0]}))
    configs = (
        SourceConfig(shards=str(folder / "a"), weight_schedule=((16, 3.0), (64, 1.0)), drop=str(folder / "drop.json")),
        SourceConfig(shards=str(folder / "b"), weight=1.0),
        SourceConfig(shards=str(folder / "c"), weight=0.0),
    )
    return open_sources(configs)


def test_a_mixture_goes_on_from_every_cut(tmp_path: Path, tokenizer_path: str) -> None:
    sources = mixture(tmp_path)

    def open_at(state: LoaderState, **more: int) -> Loader:
        return Loader(
            sources=sources, tokenizer_path=tokenizer_path, data=settings(), image_size=8, text_length=16, seed=9,
            state=state, pairs_per_step=STEP, pairs_per_forward=FORWARD, **({"rank": 0, "world": 1} | more),
        )  # fmt: skip

    whole, states = take(open_at(LoaderState()), 12)
    ids = [number for batches in whole for batch in batches for number in batch.ids.tolist()]
    assert [int(key) for key in keys_of([batch for batches in whole for batch in batches])] == ids
    assert not {1, 2, 16, 26, 27, 28} & set(ids)  # dropped, or of weight 0
    assert len(set(ids)) == 26 - 3
    # Shares 3/4 at 16 pairs, 1/2 at 64: of the first 16 pairs 12, of those after the 64th every second.
    assert sum(number < 17 for number in ids[:16]) == 12
    assert sum(number < 17 for number in ids[64:]) == 16
    for cut in range(12):
        world = (1, 2, 4)[cut % 3]
        state = LoaderState.from_json(states[cut - 1].to_json()) if cut else LoaderState()
        ranks = [take(open_at(state, rank=rank, world=world), 1) for rank in range(world)]
        rounds = zip(*(steps[0] for steps, _ in ranks), strict=True)
        assert all_same([[batch for round_ in rounds for batch in round_]], [whole[cut]])
        assert ranks[0][1] == [states[cut]]
    loader = open_at(LoaderState())
    first, second, third = loader.order.consumed(states[-1].position)
    assert (first.name, second.name, third.samples) == ("a", "b", 0)
    assert first.samples == sum(number < 17 for number in ids)
    assert second.epochs == pytest.approx(sum(17 <= number < 26 for number in ids) / 9)


def test_skipped_positions_never_come(setup: Setup) -> None:
    straight = [number for step in take(setup.open(), 6)[0] for batch in step for number in batch.ids.tolist()]
    _, states = take(setup.open(), 2)
    state = states[1].skipping(19, 25).skipping(30, 31)
    found, later = take(setup.resume(state), 3)
    ids = [number for step in found for batch in step for number in batch.ids.tolist()]
    assert ids == straight[16:19] + straight[25:30] + straight[31:47]
    assert [state.position for state in later] == [30, 39, 47]
    assert all(one.skip == ((19, 25), (30, 31)) for one in later)
    for cut in (1, 2):
        resumed = LoaderState.from_json(later[cut - 1].to_json())
        for world in (1, 2):
            ranks = [take(setup.resume(resumed, rank=rank, world=world), 3 - cut)[0] for rank in range(world)]
            for step in range(3 - cut):
                rounds = zip(*(steps[step] for steps in ranks), strict=True)
                assert all_same([[batch for round_ in rounds for batch in round_]], [found[cut + step]])


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


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    "kind", ["one shard", "one sample", "fewer shards than ranks", "skew", "an empty shard", "a shard of bad samples"]
)
def test_odd_shards_give_all_ranks_as_many_batches(tmp_path: Path, tokenizer_path: str, kind: str, world: int) -> None:
    manifest = odd_shards(tmp_path / "shards", kind)
    total = manifest.total_samples
    steps = 3 * total  # that is 3 x STEP / 1 epochs, whatever the number of samples
    setup = Setup(manifest, tokenizer_path)
    ranks = [take(setup.open(rank=rank, world=world), steps)[0] for rank in range(world)]
    assert [len(step) for found in ranks for step in found] == [STEP // FORWARD // world] * steps * world
    batches = [batch for found in ranks for step in found for batch in step]
    seen = Counter(number for batch in batches for number in batch.ids.tolist())
    bad = Counter(problem.id for batch in batches for problem in batch.problems)
    assert seen + bad == Counter(dict.fromkeys(range(total), 3 * STEP))
    assert len(bad) == (12 if kind == "a shard of bad samples" else 0)
    assert list(setup.evaluate(rank=0, world=world))  # one pass does not mind either


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


@pytest.mark.parametrize("position", [1, 5, 29, 30, 47])
def test_any_position_will_do(setup: Setup, position: int) -> None:
    keys = [key for batches in take(setup.open(), 9)[0] for batch in batches for key in batch.keys]
    steps, (state,) = take(setup.open(position=position), 1)
    assert [key for batch in steps[0] for key in batch.keys] == keys[position : position + STEP]
    assert state.position == position + STEP


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_of_one(setup: Setup, world: int) -> None:
    alone, states = take(setup.open(), 5)
    ranks = [take(setup.open(rank=rank, world=world), 5) for rank in range(world)]
    assert all(found == states for _, found in ranks)
    for step, batches in enumerate(alone):
        shares = [steps[step] for steps, _ in ranks]
        in_turn = [batch for round_ in zip(*shares, strict=True) for batch in round_]
        assert all_same([in_turn], [batches])


def test_a_sample_looks_the_same_in_any_batch_and_new_in_every_epoch(setup: Setup) -> None:
    def pictures(loader: Loader, steps: int) -> dict[str, list[torch.Tensor]]:
        found: dict[str, list[torch.Tensor]] = {}
        for batches in take(loader, steps)[0]:
            for batch in batches:
                for key, image in zip(batch.keys, batch.images, strict=True):
                    found.setdefault(key, []).append(image)
        return found

    straight, shifted = pictures(setup.open(), 8), pictures(setup.open(position=3), 3)
    assert all(torch.equal(images[0], straight[key][0]) for key, images in shifted.items())
    changed = [not torch.equal(images[0], images[1]) for images in straight.values() if len(images) > 1]
    assert sum(changed) > 0.9 * len(changed)


@pytest.mark.parametrize("text_length", [16, 64])
def test_a_batch_holds_what_it_says(
    setup: Setup, manifest: Manifest, tokenizer_path: str, text_length: int
) -> None:
    tokenizer = Tokenizer.load(tokenizer_path)
    batches = list(setup.evaluate(text_length=text_length))
    assert [len(batch.keys) for batch in batches] == [4] * 7 + [2]
    number = 0
    for batch in batches:
        size, width = batch.text_ids.shape
        assert batch.images.dtype == torch.uint8
        assert width % 8 == 0
        assert width == -(-int(batch.text_lengths.max()) // 8) * 8
        flat = [row * width + place for row in range(size) for place in range(batch.text_lengths[row])]
        assert batch.text_positions.tolist() == flat
        for row in range(size):
            assert (batch.keys[row], batch.captions[row]) == (f"{number:05d}", caption(number))
            ids = tokenizer.encode(caption(number), text_length)
            assert batch.text_ids[row].tolist() == ids + [tokenizer.pad_id] * (width - len(ids))
            assert batch.text_lengths[row] == len(ids)
            assert batch.caption_hashes[row] == caption_hash(caption(number))
            expected = eval_transform(decode(picture(number)), 8)
            assert np.array_equal(batch.images[row].numpy(), expected)
            number += 1
        assert batch.seconds > 0
    assert number == manifest.total_samples


def test_nothing_is_left_of_what_was_in_memory(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(setup.evaluate(text_length=64))
    assert any((batch.text_ids == Tokenizer.pad_id).any() for batch in whole)
    monkeypatch.setattr(collate, "_memory", lambda count: (torch.full((count,), 171, dtype=torch.uint8), False))
    assert all_same([list(setup.evaluate(text_length=64))], [whole])


def test_memory_is_used_again_only_when_nobody_reads_it(setup: Setup) -> None:
    """A worker fills a batch's memory again; whoever still holds a batch, or one row of it, must not see that."""
    expected = take(setup.open(), 40)[0]
    with closing(setup.open(data=settings(workers=1, prefetch=2))) as loader:
        held: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        for number, (batches, _) in enumerate(itertools.islice(loader.steps(), 40)):
            if number % 7 == 3:  # all of one, and a row of another
                held.append((number, batches[0].images, batches[0].text_ids))
            if number % 7 == 5:
                held.append((number, batches[0].images[-1:], batches[0].text_ids[-1:]))
            del batches
        for number, images, text_ids in held:
            whole = expected[number][0]
            assert torch.equal(images, whole.images[-len(images) :])
            assert torch.equal(text_ids, whole.text_ids[-len(text_ids) :])


def test_a_worker_keeps_few_pieces_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collate, "get_worker_info", lambda: "a worker")
    monkeypatch.setattr(collate, "_kept", [])
    places = set()
    for _ in range(50):
        packed = BatchRows(2, image_size=4, text_length=8, pad_id=0).packed([])
        places.add(packed.memory.data_ptr())
        assert packed.is_lent
        batch = packed.unpack()
        view = batch.text_ids  # whatever is held of it holds all
        del batch
        assert all(kept[-8:].view(torch.int64)[0] for kept in collate._kept)
        del view
    assert len(places) == len(collate._kept) == 1
    size = len(collate._kept[0])
    monkeypatch.setattr(collate, "MOST_KEPT_BYTES", 10 * size + 1)
    lent = [BatchRows(2, image_size=4, text_length=8, pad_id=0).packed([]) for _ in range(15)]
    assert len({packed.memory.data_ptr() for packed in lent}) == len(lent)
    assert [packed.is_lent for packed in lent].count(False) == 5


def test_evaluation_splits_over_ranks_and_workers_and_lists(setup: Setup) -> None:
    whole = list(setup.evaluate())
    shares = [list(setup.evaluate(rank=rank, world=3)) for rank in range(3)]
    in_turn = [batch for group in itertools.zip_longest(*shares) for batch in group if batch is not None]
    assert all_same([in_turn], [whole])
    assert all_same([list(setup.evaluate(workers=2))], [whole])
    some = list(setup.evaluate(indices=[29, 3, 3, 7, 8]))
    assert [batch.keys for batch in some] == [("00029", "00003", "00003", "00007"), ("00008",)]
    assert list(setup.evaluate(indices=[])) == []
    with pytest.raises(ConfigError, match=r"samples 3..30 were asked for.*has 30"):
        list(setup.evaluate(indices=[3, 30]))


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
def test_bad_samples_are_left_out_and_named(tmp_path: Path, tokenizer_path: str, workers: int) -> None:
    setup = Setup(bad_shards(tmp_path), tokenizer_path)
    data = settings(workers=workers)
    batches = [batch for step in take(setup.open(data=data, position=0), 15)[0] for batch in step]
    read = [batch for batch in batches for _ in batch.keys + tuple(p.key for p in batch.problems)]
    assert len(read) == 15 * STEP == 4 * COUNT  # four epochs: nothing vanished
    problems = [problem for batch in batches for problem in batch.problems]
    assert all(problem.id == int(problem.key) for problem in problems)
    assert sorted({(problem.key, problem.shard, problem.reason) for problem in problems}) == [
        ("00003", "shard-000000.tar", "no-caption"), ("00005", "shard-000000.tar", "no-caption"),
        ("00011", "shard-000001.tar", "bad-image"), ("00017", "shard-000002.tar", "no-image"),
        ("00021", "shard-000003.tar", "crc-mismatch"),
    ]  # fmt: skip
    assert len(problems) == 4 * 5
    assert all(problem.detail for problem in problems)
    for batch in batches:
        assert len(batch.images) == len(batch.text_ids) == len(batch.keys) == FORWARD - len(batch.problems)
        assert batch.ids.tolist() == [int(key) for key in batch.keys]


@pytest.mark.parametrize("workers", [0, 2])
def test_slots_are_the_rows_that_were_asked_for(tmp_path: Path, tokenizer_path: str, workers: int) -> None:
    """A bad sample leaves a gap, and those after it keep their rows: routing makes its groups of them."""
    made = list(samples(12))
    for number in (1, 4, 11):  # a middle one, the first and the last of a batch of four
        made[number]["png"] = b"no picture"
    setup = Setup(write_shards(made, tmp_path, samples_per_shard=12), tokenizer_path)
    in_order = list(setup.evaluate(workers=workers))
    assert [batch.slots.tolist() for batch in in_order] == [[0, 2, 3], [1, 2, 3], [0, 1, 2]]
    assert [batch.ids.tolist() for batch in in_order] == [[0, 2, 3], [5, 6, 7], [8, 9, 10]]
    steps, _ = take(setup.open(data=settings(workers=workers)), 6)
    asked = [f"{ref.sample:05d}" for ref in Plan([12], 9, settings().shuffle_window).samples(0, 6 * STEP)]
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
    [("missing", {"missing-shard": 7}), ("cut", {"truncated": 4}), ("index", {"bad-index": 7}),
     ("other index", {"bad-index": 7}), ("zeros", {"crc-mismatch": 7}), ("longer", {})],
)  # fmt: skip
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
        take(Setup(manifest, tokenizer_path).open(data=settings(workers=workers), rank=rank, world=2), 15)[0]
        for rank in range(2)
    ]
    assert [len(step) for steps in ranks for step in steps] == [STEP // FORWARD // 2] * 30  # no rank has more or fewer
    batches = [batch for steps in ranks for step in steps for batch in step]
    ids = Counter(number for batch in batches for number in batch.ids.tolist())
    problems = Counter((problem.id, problem.reason) for batch in batches for problem in batch.problems)
    assert Counter(reason for (_, reason) in problems) == reasons
    assert {shard for batch in batches for shard in [p.shard for p in batch.problems]} <= {entry.name}
    assert ids + Counter({number: count for (number, _), count in problems.items()}) == Counter(list(range(COUNT)) * 4)
    assert all(14 <= number < 21 for number, _ in problems)


def test_a_worker_that_dies_is_a_clear_error(setup: Setup) -> None:
    with closing(setup.open(data=settings(workers=1, prefetch=1))) as loader:
        steps = loader.steps()
        next(steps)
        (worker,) = (child for child in multiprocessing.active_children() if child.is_alive())
        assert worker.pid
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(DataError, match="a loader process ended unexpectedly"):
            for _ in range(5):
                next(steps)


def test_a_read_that_never_returns_is_a_clear_error_and_can_be_left(
    tmp_path: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_shards(tmp_path, count=COUNT)
    index = tmp_path / manifest.shards[2].index
    index.unlink()
    os.mkfifo(index)  # opening it waits for a writer, as opening a file of a dead server does
    monkeypatch.setattr(feed, "POLL_SECONDS", 1)
    loader = Setup(manifest, tokenizer_path).open(data=settings(workers=1, shard_seconds=1, timeout_seconds=2))
    with pytest.raises(DataError, match=r"no batch came within 2 s .*does not answer"):
        take(loader, 8)
    # What Python does to its children when it exits; then it waits for them.
    for worker in multiprocessing.active_children():
        worker.terminate()
        worker.join(timeout=10)
        assert not worker.is_alive()


def test_workers_end_with_the_loader(setup: Setup) -> None:
    loader = setup.open(data=settings(workers=2))
    next(loader.steps())
    workers = multiprocessing.active_children()
    assert len(workers) >= 2
    loader.close()
    assert not [worker for worker in workers if worker.is_alive()]


TRAINER = """
import multiprocessing, signal, subprocess, sys
from multiprocessing.context import ForkServerProcess
from data_pipeline.loading.loader import Loader
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.order.state import LoaderState
from tests.support.small_shards import settings

class SignalledAtBirth(ForkServerProcess):
    def start(self):
        super().start()
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            subprocess.run(["kill", f"-{name.value}", str(self.pid)])  # workers listen to the trainer itself

if __name__ == "__main__":
    multiprocessing.get_context("forkserver").Process = SignalledAtBirth
    loader = Loader(
        manifests=[load_manifest(sys.argv[1])], tokenizer_path=sys.argv[2], data=settings(workers=2), image_size=8,
        text_length=16, seed=0, rank=0, world=1, pairs_per_step=8, pairs_per_forward=8, state=LoaderState(),
    )
    next(loader.steps())
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    sys.stdin.read()
"""


def test_workers_ignore_signals_but_end_with_a_killed_trainer(setup: Setup, tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    trainer = subprocess.Popen(
        [sys.executable, str(script), setup.manifest.url, setup.tokenizer], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    try:
        assert trainer.stdout
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(workers) == 2
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(workers[0], name)
        time.sleep(0.3)
        assert all(os.path.exists(f"/proc/{pid}") for pid in workers)
    finally:
        trainer.kill()
        trainer.communicate()
    deadline = time.monotonic() + 15
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}")]


def test_the_runs_random_numbers_are_left_alone(setup: Setup) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    take(setup.open(data=settings(workers=1)), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_position_of_other_data_is_refused(setup: Setup, tmp_path: Path) -> None:
    _, (state,) = take(setup.open(), 1)
    with pytest.raises(ConfigError, match="seed is 10, but this position in the data was saved with seed 9"):
        setup.resume(state, seed=10)
    with pytest.raises(DataError, match="saved with other shards, weights or drop-lists, or another"):
        setup.resume(state, data=settings(shuffle_window=3))
    moved = make_shards(tmp_path / "moved", count=COUNT)
    assert Setup(moved, setup.tokenizer).resume(state)
    fewer = make_shards(tmp_path / "fewer", count=COUNT - 1)
    with pytest.raises(DataError, match="saved with other shards"):
        Setup(fewer, setup.tokenizer).resume(state)
    with pytest.raises(ConfigError, match="give a loader sources or manifests"):
        Loader(manifests=[], tokenizer_path=setup.tokenizer, data=settings(), image_size=8, text_length=16, seed=0,
               rank=0, world=1, pairs_per_step=8, pairs_per_forward=8, state=LoaderState())


def test_the_fingerprint_names_all_that_makes_the_order(setup: Setup, tmp_path: Path) -> None:
    """And a state saved before there were mixtures is still good."""
    a, b, c = mixture(tmp_path)
    manifest = setup.manifest

    def weighing(source: Source, weight: float) -> Source:
        config = dataclasses.replace(source.config, weight=weight, weight_schedule=())
        return dataclasses.replace(source, config=config)

    alone = Source(manifest=manifest, config=SourceConfig(shards=manifest.url, repeats=3))
    assert data_fingerprint([manifest], 2) == data_fingerprint([alone], 2)
    rows = [[shard.name, shard.samples, shard.sha256] for shard in manifest.shards]
    old = hashlib.sha256(json.dumps([2, rows]).encode()).hexdigest()[:32]
    assert take(setup.resume(LoaderState.from_json({"version": 1, "position": 8, "seed": 9, "data": old})), 1)
    mixtures = [
        [a, b, c], [b, a, c], [a, b], [weighing(a, 1.0), weighing(b, 1.0)], [weighing(a, 1.0), weighing(b, 1.1)],
        [dataclasses.replace(a, dropped={}), b, c], [dataclasses.replace(a, dropped={0: np.array([1])}), b, c],
        [a], [b], [dataclasses.replace(a, dropped={})],
    ]  # fmt: skip
    assert len({data_fingerprint(sources, window) for sources in mixtures for window in (2, 3)}) == 2 * len(mixtures)
    equal = [weighing(a, 2.0), weighing(b, 2.0)]
    assert data_fingerprint(equal, 2) == data_fingerprint(mixtures[3], 2)


def test_an_impossible_split_is_refused(setup: Setup) -> None:
    with pytest.raises(ConfigError, match=r"pairs_per_step is 8, .* 3 ranks = 6; the nearest is 6"):
        setup.open(world=3)


def test_captions_are_drawn_by_weight_and_place(tmp_path: Path, tokenizer_path: str) -> None:
    made = [sample | {"json": {"alt": [f"alt {n}", f"other {n}"]}} for n, sample in enumerate(samples(COUNT))]
    setup = Setup(write_shards(made, tmp_path), tokenizer_path)
    data = settings(caption_keys=("txt", "json:alt"), caption_weights=(1.0, 2.0))
    batches = [batch for step in take(setup.open(data=data), 75)[0] for batch in step]
    kinds = [text.split()[0] for batch in batches for text in batch.captions]
    shares = {kind: kinds.count(kind) / len(kinds) for kind in ("a", "alt", "other")}
    assert shares == pytest.approx({"a": 1 / 3, "alt": 1 / 3, "other": 1 / 3}, abs=0.1)  # 600 draws: 5 sigma
    # Whichever wording was drawn, pairs are equal by the caption that names the sample.
    for batch in batches:
        assert batch.caption_hashes.tolist() == [caption_hash(caption(int(key))) for key in batch.keys]
    assert load_manifest(tmp_path).total_samples == COUNT


def test_a_store_of_which_nothing_comes_is_waited_for(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage must neither use up the data nor end the run at once."""
    expected = take(setup.open(), 3)[0]
    monkeypatch.setattr(feed, "ASK_AGAIN_SECONDS", 0.01)
    real, asked, forgotten = feed.Reader.read_many, [0], [0]

    def read_many(reader: feed.Reader, places: list[tuple[int, int]]) -> list[RawSample | SampleProblem]:
        asked[0] += 1
        if 2 <= asked[0] <= 4:
            return [SampleProblem("shard", "key", "unreachable", "no route") for _ in places]
        return real(reader, places)

    monkeypatch.setattr(feed.Reader, "read_many", read_many)
    monkeypatch.setattr(feed.Reader, "forget_troubles", lambda reader: forgotten.__setitem__(0, forgotten[0] + 1))
    assert all_same(take(setup.open(), 3)[0], expected)
    assert forgotten == [3]


def test_a_store_that_stays_away_ends_the_run(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "ASK_AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(feed.Reader, "forget_troubles", lambda reader: None)
    monkeypatch.setattr(
        feed.Reader, "read_many",
        lambda reader, places: [SampleProblem("shard", "key", "unreachable", "the store refused") for _ in places],
    )
    with pytest.raises(StorageError, match=r"not one sample of a whole batch .*: the store refused. Look"):
        take(setup.open(data=settings(shard_seconds=0.2, timeout_seconds=0.6)), 1)
