"""The loader as a trainer sees it: the same samples however it is cut, and bad ones named."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
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
from data_pipeline.loading import feed
from data_pipeline.loading.loader import Loader, read_all
from data_pipeline.order.plan import LoaderState, Plan
from data_pipeline.samples import Batch
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest, load_manifest
from data_pipeline.shards.writer import write_shards
from tests.support.s3_server import S3Server
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


def take(loader: Loader, steps: int) -> tuple[list[list[Batch]], list[LoaderState]]:
    """The first steps and the states after them."""
    with closing(loader):
        found = list(itertools.islice(loader.steps(), steps))
    return [batches for batches, _ in found], [state for _, state in found]


def same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left[:5], right[:5], strict=True)) and left[5:8] == right[5:8]


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


@pytest.mark.parametrize("workers", [0, 2])
def test_it_goes_on_from_every_cut(setup: Setup, workers: int) -> None:
    whole, states = take(setup.open(), 6)
    for cut in range(6):
        state = LoaderState.from_json(states[cut - 1].to_json()) if cut else LoaderState()
        rest, later = take(setup.resume(state, data=settings(workers=workers)), 6 - cut)
        assert all_same(rest, whole[cut:])
        assert later == states[cut:]


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


def test_a_batch_holds_what_it_says(setup: Setup, manifest: Manifest, tokenizer_path: str) -> None:
    tokenizer = Tokenizer.load(tokenizer_path)
    batches = list(setup.evaluate())
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
            ids = tokenizer.encode(caption(number), 16)
            assert batch.text_ids[row].tolist() == ids + [tokenizer.pad_id] * (width - len(ids))
            assert batch.text_lengths[row] == len(ids)
            assert batch.caption_hashes[row] == caption_hash(caption(number))
            expected = eval_transform(decode(picture(number)), 8)
            assert np.array_equal(batch.images[row].numpy(), expected)
            number += 1
        assert batch.seconds > 0
    assert number == manifest.total_samples


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
    assert sorted({(problem.key, problem.shard, problem.reason) for problem in problems}) == [
        ("00003", "shard-000000.tar", "no-caption"), ("00005", "shard-000000.tar", "no-caption"),
        ("00011", "shard-000001.tar", "bad-image"), ("00017", "shard-000002.tar", "no-image"),
        ("00021", "shard-000003.tar", "crc-mismatch"),
    ]  # fmt: skip
    assert len(problems) == 4 * 5
    assert all(problem.detail for problem in problems)
    for batch in batches:
        assert len(batch.images) == len(batch.text_ids) == len(batch.keys) == FORWARD - len(batch.problems)


def test_a_batch_of_bad_samples_only_is_empty(tmp_path: Path, tokenizer_path: str) -> None:
    manifest = write_shards([{"__key__": str(n), "txt": "x"} for n in range(4)], tmp_path)
    (batch,) = Setup(manifest, tokenizer_path).evaluate()
    assert (batch.images.shape, batch.text_ids.shape) == ((0, 3, 8, 8), (0, 8))
    assert len(batch.text_positions) == len(batch.caption_hashes) == 0
    assert len(batch.problems) == 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "message"),
    [("missing", r"shard .*000002.tar is missing"), ("cut", r"expects \d+: it was cut off"),
     ("changed", r"has SHA-256 \w+, but its manifest expects"), ("index", r"index.json: No such file")],
)  # fmt: skip
def test_a_damaged_shard_ends_training_with_one_message(
    tmp_path: Path, tokenizer_path: str, workers: int, damage: str, message: str
) -> None:
    manifest = make_shards(tmp_path, count=COUNT)
    path = tmp_path / manifest.shards[2].name
    if damage == "cut":
        os.truncate(path, 5000)
    elif damage == "changed":
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
    else:
        (path if damage == "missing" else tmp_path / manifest.shards[2].index).unlink()
    with pytest.raises(DataError, match=message) as error:
        take(Setup(manifest, tokenizer_path).open(data=settings(workers=workers)), 8)
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)


@pytest.mark.s3
def test_shards_of_a_store_are_read_by_workers(
    s3_server: S3Server, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    # The fork server must start with this environment, as it does in a run; and this process uses the
    # store first, after which a forked worker would wait for ever.
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
    remote = load_manifest(s3_server.upload(Path(setup.manifest.url), "loader-test"))
    data = settings(workers=2, cache_dir=str(tmp_path / "cache"))
    found, _ = take(Setup(remote, setup.tokenizer).open(data=data), 4)
    assert all_same(found, take(setup.open(), 4)[0])
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


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
    loader = Setup(manifest, tokenizer_path).open(data=settings(workers=1, timeout_seconds=2))
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
import multiprocessing, sys
from data_pipeline.loading.loader import Loader
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.order.plan import LoaderState
from tests.support.s3_server import S3Server
from tests.support.small_shards import settings

if __name__ == "__main__":
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
    with pytest.raises(DataError, match="saved with other shards or another"):
        setup.resume(state, data=settings(shuffle_window=3))
    moved = make_shards(tmp_path / "moved", count=COUNT)
    assert Setup(moved, setup.tokenizer).resume(state)
    fewer = make_shards(tmp_path / "fewer", count=COUNT - 1)
    with pytest.raises(DataError, match="saved with other shards"):
        Setup(fewer, setup.tokenizer).resume(state)


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
