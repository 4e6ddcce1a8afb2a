"""Phases: a trained run continues on other data; both parts stay apart in state and ledger."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.commands import ledger as command
from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_spec import BatchSpec, RankInfo
from data_pipeline.loading.ledger import Ledger
from data_pipeline.loading.ledger_metadata import METADATA_FILE, LedgerMetadata
from data_pipeline.loading.loader import Loader
from data_pipeline.loading.sources import make_order, unweighted_source
from data_pipeline.order.state import EndedPhase, LoaderState, enter_phase
from data_pipeline.settings import AugmentConfig
from data_pipeline.shards.manifest import Manifest
from tests.support.small_shards import make_data_config, make_shards, make_tokenizer

GLOBAL_BATCH_SIZE = 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Manifest]:
    """16 and 24 samples; the keys of the second begin where those of the first end."""
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    return make_shards(first, count=16), make_shards(second, count=24)


class Run:
    """Steps of one run on one rank or several, with a ledger."""

    def __init__(self, tokenizer: Tokenizer, folder: Path) -> None:
        self.tokenizer, self.folder = tokenizer, folder
        self.state, self.steps_done = LoaderState(), 0

    def loader(self, sources: Sequence[Manifest], phase: int, ranks: RankInfo) -> Loader:
        return Loader(
            sources=sources,
            tokenizer=self.tokenizer,
            data=make_data_config(phase=phase, augment=AugmentConfig(flip=True)),
            batch=BatchSpec(image_size=8, context_length=16, micro_batch_size=2),
            global_batch_size=GLOBAL_BATCH_SIZE,
            seed=2,
            ranks=ranks,
            state=self.state,
        )

    def train(
        self, sources: Sequence[Manifest], phase: int, steps: int, world_size: int = 1
    ) -> list[int]:
        """Train some steps; returns the sorted ids of each step's samples, one after another."""
        ids, after = [list[int]() for _ in range(steps)], self.state
        for rank in range(world_size):
            loader = self.loader(sources, phase, RankInfo(rank=rank, world_size=world_size))
            metadata = LedgerMetadata.of(loader.sources, 2, loader.state)
            ledger = Ledger.open(
                self.folder,
                rank=rank,
                world_size=world_size,
                micro_batch_size=2,
                resumed_step=self.steps_done,
                metadata=metadata,
            )
            with closing(loader), closing(ledger):
                before = loader.state.position
                for step, (batches, after) in enumerate(itertools.islice(loader.steps(), steps)):
                    ledger.add(self.steps_done + step + 1, before, after.position, batches)
                    before = after.position
                    ids[step] += [int(i) for batch in batches for i in batch.ids]
        self.state, self.steps_done = after, self.steps_done + steps
        return [sample for step in ids for sample in sorted(step)]


def check(folder: Path) -> int:
    return command.handle(argparse.Namespace(folder=folder, data=""))


def test_new_phase_is_a_new_order_from_the_saved_position(
    tokenizer: Tokenizer,
    manifests: tuple[Manifest, Manifest],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = manifests
    run = Run(tokenizer, tmp_path / "ledger")
    assert sorted(run.train([first], 1, 2)) == list(range(16))
    run.train([first], 1, 1)
    ended = run.state

    # 16 + 24 samples: an epoch of the new phase has 5 steps, resumed once on two ranks.
    epoch = run.train([first, second], 2, 3) + run.train([first, second], 2, 2, world_size=2)
    assert sorted(epoch) == list(range(40))
    assert run.state.ended_phases == (EndedPhase(data=ended.data, end=24),)
    assert (run.state.phase, run.state.phase_begin, run.state.position) == (2, 24, 64)
    assert LoaderState.from_json(json.dumps(run.state.to_json())) == run.state

    sources = [unweighted_source(manifest) for manifest in manifests]
    order = make_order(sources, run.state.order_seed, 2)
    shifted = make_order(sources, run.state.order_seed, 2, begin=24)
    assert shifted.samples(24, 40) == order.samples(0, 40)
    assert shifted.sources_of(30, 9) == order.sources_of(6, 9)
    assert shifted.consumed(44) == order.consumed(20)
    shards = [list(itertools.islice(o.shards_from(p), 3)) for o, p in ((shifted, 34), (order, 10))]
    assert shards[0] == shards[1]
    with pytest.raises(ValueError, match="position 23 is before the phase"):
        shifted.samples(23, 2)

    run.train([second], 3, 3)  # the third phase drops the first source
    assert check(run.folder) == 0
    output = capsys.readouterr().out
    assert "phase 1           from 0: 24 samples" in output
    assert "phase 2           from 24: 40 samples" in output
    assert "phase 3           from 64: 24 samples" in output


def test_a_phase_shuffles_and_augments_again(
    tokenizer: Tokenizer, manifests: tuple[Manifest, Manifest], tmp_path: Path
) -> None:
    """The same data in the next phase: the same samples in another order, flipped differently."""
    run, images = Run(tokenizer, tmp_path), []
    for phase in (1, 2):
        with closing(run.loader([manifests[1]], phase, RankInfo(rank=0, world_size=1))) as loader:
            batches: dict[int, np.ndarray] = {}
            for step, run.state in itertools.islice(loader.steps(), 3):
                batches |= {
                    int(i): image.numpy().copy()
                    for batch in step
                    for i, image in zip(batch.ids, batch.images, strict=True)
                }
        images.append(batches)
    assert list(images[0]) != list(images[1]) and sorted(images[0]) == sorted(images[1])
    flipped = [i for i in images[0] if not np.array_equal(images[0][i], images[1][i])]
    assert 0 < len(flipped) < 24


def test_other_data_needs_a_new_phase(
    tokenizer: Tokenizer, manifests: tuple[Manifest, Manifest], tmp_path: Path
) -> None:
    run = Run(tokenizer, tmp_path)
    run.train([manifests[0]], 1, 1)
    one = RankInfo(rank=0, world_size=1)
    with pytest.raises(DataError, match=r"different shards.*set data\.phase=2 to continue"):
        run.loader(manifests, 1, one)
    with pytest.raises(ConfigError, match=r"data\.phase is 3.* in phase 1; set it to 1 .*or to 2"):
        run.loader(manifests, 3, one)
    run.train(manifests, 2, 1)
    with pytest.raises(ConfigError, match=r"data\.phase is 1.* in phase 2; set it to 2 .*or to 3"):
        run.loader([manifests[0]], 1, one)
    run.state = LoaderState()
    with pytest.raises(ConfigError, match=r"data\.phase is 2, but a new run begins with phase 1"):
        run.loader([manifests[0]], 2, one)


def test_skipped_positions_of_the_old_order_end_with_it() -> None:
    state = LoaderState(position=20, seed=1, data="a", skip=((4, 8), (18, 30), (40, 44)))
    entered = enter_phase(state, seed=1, fingerprint="b", phase=2)
    assert entered.skip == ((4, 8), (18, 20)) and entered.data == "b"
    # Started again from the same checkpoint, for example after a crash: the same state.
    assert enter_phase(state, seed=1, fingerprint="b", phase=2) == entered
    assert enter_phase(entered, seed=1, fingerprint="b", phase=2) == entered
    with pytest.raises(ConfigError, match="seed is 3"):
        enter_phase(entered, seed=3, fingerprint="c", phase=3)


def test_ledger_keeps_the_data_of_earlier_phases(
    tokenizer: Tokenizer,
    manifests: tuple[Manifest, Manifest],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Run(tokenizer, tmp_path / "ledger")
    run.train([manifests[0]], 1, 3)
    checkpoint = run.state, run.steps_done
    run.train(manifests, 2, 2)
    run.state, run.steps_done = checkpoint  # interrupted before the next checkpoint
    run.train(manifests, 2, 4)
    run.train(manifests, 2, 1)
    metadata = LedgerMetadata.read(run.folder)
    assert [len(phase.sources) for phase in metadata.phases] == [1, 2]
    assert [phase.begin for phase in metadata.phases] == [0, 24]
    assert check(run.folder) == 0

    # Phases at another position, and phases whose data is not known.
    moved = replace(metadata.phases[1], begin=28)
    replace(metadata, phases=(metadata.phases[0], moved)).write(run.folder)
    assert check(run.folder) == 1
    assert "positions 24 to 32, but the next phase begins at position 28" in capsys.readouterr().out
    (run.folder / METADATA_FILE).unlink()
    unknown = replace(metadata.phases[0], sources=(), manifests=())
    replace(metadata, phases=(unknown, metadata.phases[1])).write(run.folder)
    with pytest.raises(DataError, match=r"step 1 begins at position 0, before the first phase"):
        check(run.folder)


def test_metadata_of_version_1_is_read(
    tokenizer: Tokenizer, manifests: tuple[Manifest, Manifest], tmp_path: Path
) -> None:
    run = Run(tokenizer, tmp_path / "ledger")
    run.train([manifests[0]], 1, 2)
    path = run.folder / METADATA_FILE
    content = json.loads(path.read_text())
    (phase,) = content.pop("phases")
    del phase["begin"]
    path.write_text(json.dumps(content | phase | {"version": 1}))
    assert check(run.folder) == 0
    run.train(manifests, 2, 2)
    assert check(run.folder) == 0
    assert json.loads(path.read_text())["version"] == 2
