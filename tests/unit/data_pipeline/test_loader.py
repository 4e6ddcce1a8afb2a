"""The loader as a trainer sees it: the same samples however it is cut."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.captions import caption_hash
from data_pipeline.content.images import decode
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.content.transforms import eval_transform
from data_pipeline.loading import collate
from data_pipeline.loading.loader import Loader
from data_pipeline.loading.sources import Source, data_fingerprint, open_sources
from data_pipeline.order.drop import make_drop_list, write_drop_list
from data_pipeline.order.plan import Plan
from data_pipeline.order.state import LoaderState
from data_pipeline.samples import Batch
from data_pipeline.settings import SourceConfig
from data_pipeline.shards.manifest import Manifest, load_manifest
from data_pipeline.shards.writer import write_shards
from tests.support.loaders import COUNT, FORWARD, STEP, Setup, all_same, keys_of, take
from tests.support.small_shards import caption, make_shards, picture, samples, settings


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
    for cut, world_size, workers in zip(cuts, (1, 2, 4, 1, 2), (0, 2, 1, 4, 3), strict=False):
        ranks = [
            take(
                setup.resume(
                    state, data=settings(workers=workers), rank=rank, world_size=world_size
                ),
                cut,
            )
            for rank in range(world_size)
        ]
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
        SourceConfig(
            shards=str(folder / "a"),
            weight_schedule=((16, 3.0), (64, 1.0)),
            drop=str(folder / "drop.json"),
        ),
        SourceConfig(shards=str(folder / "b"), weight=1.0),
        SourceConfig(shards=str(folder / "c"), weight=0.0),
    )
    return open_sources(configs)


def test_a_mixture_goes_on_from_every_cut(tmp_path: Path, tokenizer_path: str) -> None:
    sources = mixture(tmp_path)

    def open_at(state: LoaderState, **more: int) -> Loader:
        return Loader(
            sources=sources,
            tokenizer_path=tokenizer_path,
            data=settings(),
            image_size=8,
            context_length=16,
            seed=9,
            state=state,
            global_batch_size=STEP,
            micro_batch_size=FORWARD,
            **({"rank": 0, "world_size": 1} | more),
        )

    whole, states = take(open_at(LoaderState()), 12)
    ids = [number for batches in whole for batch in batches for number in batch.ids.tolist()]
    assert [int(key) for key in keys_of([batch for batches in whole for batch in batches])] == ids
    assert not {1, 2, 16, 26, 27, 28} & set(ids)  # dropped, or of weight 0
    assert len(set(ids)) == 26 - 3
    # Shares 3/4 at 16 pairs, 1/2 at 64: of the first 16 pairs 12, of those after the 64th every
    # second.
    assert sum(number < 17 for number in ids[:16]) == 12
    assert sum(number < 17 for number in ids[64:]) == 16
    for cut in range(12):
        world_size = (1, 2, 4)[cut % 3]
        state = LoaderState.from_json(states[cut - 1].to_json()) if cut else LoaderState()
        ranks = [
            take(open_at(state, rank=rank, world_size=world_size), 1) for rank in range(world_size)
        ]
        rounds = zip(*(steps[0] for steps, _ in ranks), strict=True)
        assert all_same([[batch for round_ in rounds for batch in round_]], [whole[cut]])
        assert ranks[0][1] == [states[cut]]
    loader = open_at(LoaderState())
    first, second, third = loader.order.consumed(states[-1].position)
    assert (first.name, second.name, third.samples) == ("a", "b", 0)
    assert first.samples == sum(number < 17 for number in ids)
    assert second.epochs == pytest.approx(sum(17 <= number < 26 for number in ids) / 9)


def test_skipped_positions_never_come(setup: Setup) -> None:
    straight = [
        number
        for step in take(setup.open(), 6)[0]
        for batch in step
        for number in batch.ids.tolist()
    ]
    _, states = take(setup.open(), 2)
    state = states[1].skipping(19, 25).skipping(30, 31)
    found, later = take(setup.resume(state), 3)
    ids = [number for step in found for batch in step for number in batch.ids.tolist()]
    assert ids == straight[16:19] + straight[25:30] + straight[31:47]
    assert [state.position for state in later] == [30, 39, 47]
    assert all(one.skip == ((19, 25), (30, 31)) for one in later)
    for cut in (1, 2):
        resumed = LoaderState.from_json(later[cut - 1].to_json())
        for world_size in (1, 2):
            ranks = [
                take(setup.resume(resumed, rank=rank, world_size=world_size), 3 - cut)[0]
                for rank in range(world_size)
            ]
            for step in range(3 - cut):
                rounds = zip(*(steps[step] for steps in ranks), strict=True)
                assert all_same(
                    [[batch for round_ in rounds for batch in round_]], [found[cut + step]]
                )


@pytest.mark.parametrize("position", [1, 5, 29, 30, 47])
def test_any_position_will_do(setup: Setup, position: int) -> None:
    keys = [key for batches in take(setup.open(), 9)[0] for batch in batches for key in batch.keys]
    steps, (state,) = take(setup.open(position=position), 1)
    assert [key for batch in steps[0] for key in batch.keys] == keys[position : position + STEP]
    assert state.position == position + STEP


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batches_of_one(setup: Setup, world_size: int) -> None:
    alone, states = take(setup.open(), 5)
    ranks = [take(setup.open(rank=rank, world_size=world_size), 5) for rank in range(world_size)]
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
    changed = [
        not torch.equal(images[0], images[1]) for images in straight.values() if len(images) > 1
    ]
    assert sum(changed) > 0.9 * len(changed)


@pytest.mark.parametrize("context_length", [16, 64])
def test_a_batch_holds_what_it_says(
    setup: Setup, manifest: Manifest, tokenizer_path: str, context_length: int
) -> None:
    tokenizer = Tokenizer.load(tokenizer_path)
    batches = list(setup.evaluate(context_length=context_length))
    assert [len(batch.keys) for batch in batches] == [4] * 7 + [2]
    number = 0
    for batch in batches:
        size, width = batch.text_ids.shape
        assert batch.images.dtype == torch.uint8
        assert width % 8 == 0
        assert width == -(-int(batch.text_lengths.max()) // 8) * 8
        flat = [
            row * width + place for row in range(size) for place in range(batch.text_lengths[row])
        ]
        assert batch.text_positions.tolist() == flat
        for row in range(size):
            assert (batch.keys[row], batch.captions[row]) == (f"{number:05d}", caption(number))
            ids = tokenizer.encode(caption(number), context_length)
            assert batch.text_ids[row].tolist() == ids + [tokenizer.pad_id] * (width - len(ids))
            assert batch.text_lengths[row] == len(ids)
            assert batch.caption_hashes[row] == caption_hash(caption(number))
            expected = eval_transform(decode(picture(number)), 8)
            assert np.array_equal(batch.images[row].numpy(), expected)
            number += 1
        assert batch.seconds > 0
    assert number == manifest.total_samples


def test_nothing_is_left_of_what_was_in_memory(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(setup.evaluate(context_length=64))
    assert any((batch.text_ids == Tokenizer.pad_id).any() for batch in whole)
    monkeypatch.setattr(
        collate, "_memory", lambda count: (torch.full((count,), 171, dtype=torch.uint8), False)
    )
    assert all_same([list(setup.evaluate(context_length=64))], [whole])


def test_memory_is_used_again_only_when_nobody_reads_it(setup: Setup) -> None:
    """A worker fills a batch's memory again; whoever still holds a batch, or one row of it, must
    not see that."""
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


def test_evaluation_splits_over_ranks_and_workers_and_lists(setup: Setup) -> None:
    whole = list(setup.evaluate())
    shares = [list(setup.evaluate(rank=rank, world_size=3)) for rank in range(3)]
    in_turn = [
        batch for group in itertools.zip_longest(*shares) for batch in group if batch is not None
    ]
    assert all_same([in_turn], [whole])
    assert all_same([list(setup.evaluate(workers=2))], [whole])
    some = list(setup.evaluate(indices=[29, 3, 3, 7, 8]))
    assert [batch.keys for batch in some] == [("00029", "00003", "00003", "00007"), ("00008",)]
    assert list(setup.evaluate(indices=[])) == []
    with pytest.raises(ConfigError, match=r"samples 3..30 were asked for.*has 30"):
        list(setup.evaluate(indices=[3, 30]))


def test_the_runs_random_numbers_are_left_alone(setup: Setup) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    take(setup.open(data=settings(workers=1)), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_position_of_other_data_is_refused(setup: Setup, tmp_path: Path) -> None:
    _, (state,) = take(setup.open(), 1)
    with pytest.raises(
        ConfigError, match="seed is 10, but this position in the data was saved with seed 9"
    ):
        setup.resume(state, seed=10)
    with pytest.raises(
        DataError, match="saved with other shards, weights or drop-lists, or another"
    ):
        setup.resume(state, data=settings(shuffle_window=3))
    moved = make_shards(tmp_path / "moved", count=COUNT)
    assert Setup(moved, setup.tokenizer).resume(state)
    fewer = make_shards(tmp_path / "fewer", count=COUNT - 1)
    with pytest.raises(DataError, match="saved with other shards"):
        Setup(fewer, setup.tokenizer).resume(state)
    with pytest.raises(ConfigError, match="give a loader sources or manifests"):
        Loader(
            manifests=[],
            tokenizer_path=setup.tokenizer,
            data=settings(),
            image_size=8,
            context_length=16,
            seed=0,
            rank=0,
            world_size=1,
            global_batch_size=8,
            micro_batch_size=8,
            state=LoaderState(),
        )


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
    assert take(
        setup.resume(LoaderState.from_json({"version": 1, "position": 8, "seed": 9, "data": old})),
        1,
    )
    mixtures = [
        [a, b, c],
        [b, a, c],
        [a, b],
        [weighing(a, 1.0), weighing(b, 1.0)],
        [weighing(a, 1.0), weighing(b, 1.1)],
        [dataclasses.replace(a, dropped={}), b, c],
        [dataclasses.replace(a, dropped={0: np.array([1])}), b, c],
        [a],
        [b],
        [dataclasses.replace(a, dropped={})],
    ]
    assert len(
        {data_fingerprint(sources, window) for sources in mixtures for window in (2, 3)}
    ) == 2 * len(mixtures)
    equal = [weighing(a, 2.0), weighing(b, 2.0)]
    assert data_fingerprint(equal, 2) == data_fingerprint(mixtures[3], 2)


def test_an_impossible_split_is_refused(setup: Setup) -> None:
    with pytest.raises(
        ConfigError, match=r"global_batch_size is 8, .* 3 ranks = 6; the nearest is 6"
    ):
        setup.open(world_size=3)


def test_captions_are_drawn_by_weight_and_place(tmp_path: Path, tokenizer_path: str) -> None:
    made = [
        sample | {"json": {"alt": [f"alt {n}", f"other {n}"]}}
        for n, sample in enumerate(samples(COUNT))
    ]
    setup = Setup(write_shards(made, tmp_path), tokenizer_path)
    data = settings(caption_keys=("txt", "json:alt"), caption_weights=(1.0, 2.0))
    batches = [batch for step in take(setup.open(data=data), 75)[0] for batch in step]
    kinds = [text.split()[0] for batch in batches for text in batch.captions]
    shares = {kind: kinds.count(kind) / len(kinds) for kind in ("a", "alt", "other")}
    assert shares == pytest.approx(
        {"a": 1 / 3, "alt": 1 / 3, "other": 1 / 3}, abs=0.1
    )  # 600 draws: 5 sigma
    # Whichever wording was drawn, pairs are equal by the caption that names the sample.
    for batch in batches:
        assert batch.caption_hashes.tolist() == [
            caption_hash(caption(int(key))) for key in batch.keys
        ]
    assert load_manifest(tmp_path).total_samples == COUNT
