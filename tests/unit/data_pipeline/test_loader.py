"""The order of the loader's batches: the same for any number of ranks and workers, and after
resuming."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_spec import BatchSpec, RankInfo
from data_pipeline.loading.loader import Loader
from data_pipeline.loading.sources import Source, open_sources
from data_pipeline.order.drop_list import make_drop_list, write_drop_list
from data_pipeline.order.plan import Plan
from data_pipeline.order.state import LoaderState
from data_pipeline.samples import Batch
from data_pipeline.settings import SourceConfig
from tests.support.loaders import (
    GLOBAL_BATCH_SIZE,
    MICRO_BATCH_SIZE,
    NUM_SAMPLES,
    LoaderFactory,
    sample_keys,
    steps_equal,
    take_steps,
)
from tests.support.small_shards import make_data_config, make_shards


def interleave(steps_by_rank: Sequence[Sequence[Batch]]) -> list[Batch]:
    """Micro-batches of all ranks in the order of their positions."""
    return [batch for row in zip(*steps_by_rank, strict=True) for batch in row]


def sample_ids(steps: Sequence[Sequence[Batch]]) -> list[int]:
    return [sample for batches in steps for batch in batches for sample in batch.ids.tolist()]


def test_steps_follow_the_plan(factory: LoaderFactory) -> None:
    steps, states = take_steps(factory.open(), 9)  # more than two epochs: steps span epochs
    keys = [key for batches in steps for batch in batches for key in batch.keys]
    sizes = [shard.samples for shard in factory.manifest.shards]
    plan = Plan(sizes, 9, make_data_config().shuffle_window)
    refs = plan.samples(0, 9 * GLOBAL_BATCH_SIZE)
    assert keys == [f"{7 * ref.shard + ref.sample:05d}" for ref in refs]
    assert [state.position for state in states] == [GLOBAL_BATCH_SIZE * i for i in range(1, 10)]
    assert [len(batches) for batches in steps] == [GLOBAL_BATCH_SIZE // MICRO_BATCH_SIZE] * 9
    assert sample_ids(steps) == [int(key) for key in keys]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_after_every_step(factory: LoaderFactory, workers: int) -> None:
    expected, states = take_steps(factory.open(), 6)
    for done in range(6):
        state = LoaderState.from_json(states[done - 1].to_json()) if done else LoaderState()
        loader = factory.resume(state, data=make_data_config(workers=workers))
        resumed, resumed_states = take_steps(loader, 6 - done)
        assert steps_equal(resumed, expected[done:])
        assert resumed_states == states[done:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("runs", [(1, 1, 1, 1, 2), (3, 3)])
def test_resume_with_other_ranks_and_workers(factory: LoaderFactory, runs: tuple[int, ...]) -> None:
    """Several times within an epoch and beyond: 1, 2, 4 and 1 ranks, 0 to 4 workers."""
    expected, _ = take_steps(factory.open(), sum(runs))
    state, resumed = LoaderState(), list[list[Batch]]()
    for num_steps, world_size, workers in zip(runs, (1, 2, 4, 1, 2), (0, 2, 1, 4, 3), strict=False):
        data = make_data_config(workers=workers)
        ranks = [
            take_steps(
                factory.resume(state, data=data, rank=rank, world_size=world_size), num_steps
            )
            for rank in range(world_size)
        ]
        assert len({str(states) for _, states in ranks}) == 1
        resumed += [interleave([steps[i] for steps, _ in ranks]) for i in range(num_steps)]
        state = LoaderState.from_json(ranks[0][1][-1].to_json())
    assert steps_equal(resumed, expected)


def make_mixture(folder: Path) -> tuple[Source, ...]:
    """Three sources: one with a drop-list, one with weight 0."""
    for name, count, first in (("a", 17, 0), ("b", 9, 17), ("c", 3, 26)):
        manifest = make_shards(folder / name, count=count, samples_per_shard=4, first=first)
        if name == "a":
            drop = make_drop_list(manifest, {0: [1, 2], 4: [0]})
            write_drop_list(folder / "drop.json", drop)

    return open_sources(
        (
            SourceConfig(
                shards=str(folder / "a"),
                weight_schedule=((16, 3.0), (64, 1.0)),
                drop=str(folder / "drop.json"),
            ),
            SourceConfig(shards=str(folder / "b"), weight=1.0),
            SourceConfig(shards=str(folder / "c"), weight=0.0),
        )
    )


def test_resume_of_a_mixture(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = make_mixture(tmp_path)

    def open_loader(state: LoaderState, rank: int = 0, world_size: int = 1) -> Loader:
        return Loader(
            sources=sources,
            tokenizer=tokenizer,
            data=make_data_config(),
            batch=BatchSpec(image_size=8, context_length=16, micro_batch_size=MICRO_BATCH_SIZE),
            global_batch_size=GLOBAL_BATCH_SIZE,
            seed=9,
            ranks=RankInfo(rank=rank, world_size=world_size),
            state=state,
        )

    expected, states = take_steps(open_loader(LoaderState()), 12)
    ids = sample_ids(expected)
    keys = sample_keys([batch for batches in expected for batch in batches])
    assert [int(key) for key in keys] == ids
    assert not {1, 2, 16, 26, 27, 28} & set(ids)  # dropped, or of weight 0
    assert len(set(ids)) == 26 - 3
    # Fraction of the first source: 3/4 until pair 16 (12 of 16), 1/2 from pair 64 on.
    assert sum(sample < 17 for sample in ids[:16]) == 12
    assert sum(sample < 17 for sample in ids[64:]) == 16

    for done in range(12):
        world_size = (1, 2, 4)[done % 3]
        state = LoaderState.from_json(states[done - 1].to_json()) if done else LoaderState()
        ranks = [take_steps(open_loader(state, rank, world_size), 1) for rank in range(world_size)]
        resumed = interleave([steps[0] for steps, _ in ranks])
        assert steps_equal([resumed], [expected[done]])
        assert ranks[0][1] == [states[done]]

    first, second, third = open_loader(LoaderState()).order.consumed(states[-1].position)
    assert (first.name, second.name, third.samples) == ("a", "b", 0)
    assert first.samples == sum(sample < 17 for sample in ids)
    assert second.epochs == pytest.approx(sum(17 <= sample < 26 for sample in ids) / 9)


def test_skipped_positions_are_not_delivered(factory: LoaderFactory) -> None:
    unskipped = sample_ids(take_steps(factory.open(), 6)[0])
    _, states = take_steps(factory.open(), 2)
    state = states[1].with_skipped(19, 25).with_skipped(30, 31)
    steps, later_states = take_steps(factory.resume(state), 3)
    assert sample_ids(steps) == unskipped[16:19] + unskipped[25:30] + unskipped[31:47]
    assert [state.position for state in later_states] == [30, 39, 47]
    assert all(state.skip == ((19, 25), (30, 31)) for state in later_states)

    for done in (1, 2):
        state = LoaderState.from_json(later_states[done - 1].to_json())
        for world_size in (1, 2):
            ranks = [
                take_steps(factory.resume(state, rank=rank, world_size=world_size), 3 - done)[0]
                for rank in range(world_size)
            ]
            resumed = [interleave([rank[i] for rank in ranks]) for i in range(3 - done)]
            assert steps_equal(resumed, steps[done:])


@pytest.mark.parametrize("position", [1, 5, 29, 30, 47])
def test_start_at_any_position(factory: LoaderFactory, position: int) -> None:
    steps, _ = take_steps(factory.open(), 9)
    keys = [key for batches in steps for batch in batches for key in batch.keys]
    (batches,), (state,) = take_steps(factory.open(position=position), 1)
    expected = keys[position : position + GLOBAL_BATCH_SIZE]
    assert [key for batch in batches for key in batch.keys] == expected
    assert state.position == position + GLOBAL_BATCH_SIZE


@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batches_are_divided_among_ranks(factory: LoaderFactory, world_size: int) -> None:
    expected, states = take_steps(factory.open(), 5)
    ranks = [
        take_steps(factory.open(rank=rank, world_size=world_size), 5) for rank in range(world_size)
    ]
    assert all(rank_states == states for _, rank_states in ranks)
    combined = [interleave([steps[i] for steps, _ in ranks]) for i in range(5)]
    assert steps_equal(combined, expected)


def test_state_of_other_data_is_an_error(factory: LoaderFactory, tmp_path: Path) -> None:
    _, (state,) = take_steps(factory.open(), 1)
    with pytest.raises(ConfigError, match=r"seed is 10, .* seed 9"):
        factory.resume(state, seed=10)
    with pytest.raises(DataError, match=r"shards, weights, drop-lists or data\.shuffle_window"):
        factory.resume(state, data=make_data_config(shuffle_window=3))

    moved = make_shards(tmp_path / "moved", count=NUM_SAMPLES)
    assert LoaderFactory(moved, factory.tokenizer).resume(state)
    fewer = make_shards(tmp_path / "fewer", count=NUM_SAMPLES - 1)
    with pytest.raises(DataError, match="different shards"):
        LoaderFactory(fewer, factory.tokenizer).resume(state)


def test_no_sources(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"no sources.*data\.train"):
        Loader(
            sources=[],
            tokenizer=tokenizer,
            data=make_data_config(),
            batch=BatchSpec(image_size=8, context_length=16, micro_batch_size=8),
            global_batch_size=8,
            seed=0,
            state=LoaderState(),
        )


def test_global_batch_that_cannot_be_divided(factory: LoaderFactory) -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size is 8, .* 3 ranks = 6; .*size=6"):
        factory.open(world_size=3)
