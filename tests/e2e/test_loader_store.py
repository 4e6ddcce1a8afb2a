"""Shards in a store give the same samples in the same order as local ones.

With and without a cache, and when a run is interrupted and resumed with other numbers of ranks.
"""

from __future__ import annotations

import itertools
import multiprocessing.forkserver
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch

from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_spec import BatchSpec, RankInfo
from data_pipeline.loading.loader import Loader, read_all
from data_pipeline.loading.sources import unweighted_source
from data_pipeline.order.state import LoaderState
from data_pipeline.samples import Batch
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest, load_manifest
from tests.support.http_server import HttpServer, http_server
from tests.support.s3_server import S3Server
from tests.support.small_shards import make_data_config, make_shards, make_tokenizer
from tests.support.waiting import wait_until

GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE = 8, 2
CACHES = {
    "no cache": {"cache_gib": 0.0, "fetch_ahead": 0},
    "cache": {"fetch_ahead": 0},
    "cache and fetch-ahead": {"fetch_ahead": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shards of two datasets and a tokenizer."""
    folder = tmp_path_factory.mktemp("store")
    for name, count in (("a", 23), ("b", 11)):
        make_shards(folder / name, count=count, samples_per_shard=4)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[HttpServer]:
    with http_server(folder) as running:
        yield running


def load_steps(
    loader: Loader, steps: int, *, close_when: Callable[[], bool] = lambda: True
) -> tuple[list[list[Batch]], LoaderState]:
    """The batches of each of the next steps, and the state after them."""
    with closing(loader):
        loaded = list(itertools.islice(loader.steps(), steps))
        wait_until(close_when)
    return [batches for batches, _ in loaded], loaded[-1][1]


def open_loader(
    manifests: Sequence[Manifest],
    folder: Path,
    data: DataConfig,
    *,
    state: LoaderState | None = None,
    ranks: RankInfo | None = None,
) -> Loader:
    return Loader(
        sources=[unweighted_source(manifest) for manifest in manifests],
        tokenizer=Tokenizer.load(folder / "tokenizer.model"),
        data=data,
        batch=BatchSpec(image_size=8, context_length=16, micro_batch_size=MICRO_BATCH_SIZE),
        seed=3,
        ranks=ranks or RankInfo(rank=0, world_size=1),
        global_batch_size=GLOBAL_BATCH_SIZE,
        state=state or LoaderState(),
    )


def assert_batches_equal(actual: Sequence[Batch], expected: Sequence[Batch]) -> None:
    for left, right in zip(actual, expected, strict=True):
        assert left.keys == right.keys
        assert left.problems == right.problems == ()
        for a, b in zip((*left[:5], left.ids), (*right[:5], right.ids), strict=True):
            assert torch.equal(a, b)


@pytest.mark.e2e
@pytest.mark.parametrize("cache", CACHES)
def test_store_equals_disk_after_each_restart(
    server: HttpServer, folder: Path, tmp_path: Path, cache: str
) -> None:
    local = [load_manifest(folder / name) for name in ("a", "b")]
    remote = [load_manifest(server.url(name)) for name in ("a", "b")]
    steps, _ = load_steps(open_loader(local, folder, make_data_config()), 10)
    expected = list(itertools.chain(*steps))

    data = make_data_config(cache_dir=str(tmp_path / "cache"), **CACHES[cache])
    fetches_ahead = CACHES[cache]["fetch_ahead"] > 0

    def copies_are_as_expected() -> bool:
        # How many shards are fetched ahead depends on timing.
        return any((tmp_path / "cache").rglob("*.tar")) == fetches_ahead

    state, actual = LoaderState(), list[Batch]()
    for num_steps, world_size, manifests in (
        (2, 1, remote),
        (3, 2, remote),
        (1, 1, local),
        (2, 4, remote),
        (2, 1, remote),
    ):
        results = []
        for rank in range(world_size):
            ranks = RankInfo(rank=rank, world_size=world_size)
            loader = open_loader(manifests, folder, data, state=state, ranks=ranks)
            results.append(load_steps(loader, num_steps, close_when=copies_are_as_expected))
        for step in range(num_steps):
            # One process takes the micro-batches of all ranks in turn.
            for micro_batches in zip(*(steps[step] for steps, _ in results), strict=True):
                actual.extend(micro_batches)
        state = LoaderState.from_json(results[-1][1].to_json())

    assert_batches_equal(actual, expected)
    assert copies_are_as_expected()


@pytest.mark.e2e
def test_read_all_from_a_store(server: HttpServer, folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    data = make_data_config(cache_dir=str(tmp_path / "cache"))
    batch = BatchSpec(image_size=8, context_length=16, micro_batch_size=4)
    local, remote = (
        list(read_all(load_manifest(address), tokenizer=tokenizer, data=data, batch=batch))
        for address in (str(folder / "a"), server.url("a"))
    )
    assert_batches_equal(remote, local)
    assert sum(len(batch.keys) for batch in remote) == 23


@pytest.mark.s3
def test_workers_read_from_a_store(
    s3_server: S3Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    # The fork server must start with this environment. As in a run, this process uses the store
    # before it starts workers; workers forked from this process itself would hang.
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
    local = load_manifest(folder / "a")
    remote = load_manifest(s3_server.upload(folder / "a", "loader-test"))
    expected, _ = load_steps(open_loader([local], folder, make_data_config()), 4)
    data = make_data_config(workers=2, cache_dir=str(tmp_path / "cache"))
    actual, _ = load_steps(open_loader([remote], folder, data), 4)
    assert_batches_equal(list(itertools.chain(*actual)), list(itertools.chain(*expected)))
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
