"""Shards of a store: the same samples in the same order as from a disk, with a cache or without, at
every cut."""

from __future__ import annotations

import itertools
import multiprocessing.forkserver
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch

from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.loader import Loader, read_all
from data_pipeline.loading.sources import plain_source
from data_pipeline.order.state import LoaderState
from data_pipeline.samples import Batch
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest, load_manifest
from tests.support.http_server import HttpServer, http_server
from tests.support.s3_server import S3Server
from tests.support.small_shards import make_shards, make_tokenizer, settings

STEP, FORWARD = 8, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    for name, count in (("a", 23), ("b", 11)):
        make_shards(folder / name, count=count, samples_per_shard=4)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[HttpServer]:
    with http_server(folder) as running:
        yield running


def take(
    manifests: Sequence[Manifest],
    folder: Path,
    data: DataConfig,
    state: LoaderState,
    steps: int,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[list[list[Batch]], LoaderState]:
    loader = Loader(
        sources=[plain_source(manifest) for manifest in manifests],
        tokenizer_path=str(folder / "tokenizer.model"),
        data=data,
        image_size=8,
        context_length=16,
        seed=3,
        rank=rank,
        world_size=world_size,
        global_batch_size=STEP,
        micro_batch_size=FORWARD,
        state=state,
    )
    with closing(loader):
        found = list(itertools.islice(loader.steps(), steps))
    return [batches for batches, _ in found], found[-1][1]


def assert_same(found: Sequence[Batch], expected: Sequence[Batch]) -> None:
    for left, right in zip(found, expected, strict=True):
        assert left.keys == right.keys
        assert left.problems == right.problems == ()
        for mine, theirs in zip((*left[:5], left.ids), (*right[:5], right.ids), strict=True):
            assert torch.equal(mine, theirs)


CACHES = {
    "no cache": {"cache_gib": 0.0, "fetch_ahead": 0},
    "a cache, nothing ahead": {"fetch_ahead": 0},
    "copies ahead": {"fetch_ahead": 2},
}


@pytest.mark.e2e
@pytest.mark.parametrize("cache", CACHES)
def test_a_store_gives_what_a_disk_gives_at_every_cut(
    server: HttpServer, folder: Path, tmp_path: Path, cache: str
) -> None:
    local = [load_manifest(folder / name) for name in ("a", "b")]
    remote = [load_manifest(server.url(name)) for name in ("a", "b")]
    data = settings(cache_dir=str(tmp_path / "cache"), **CACHES[cache])
    whole = [
        batch
        for batches in take(local, folder, settings(), LoaderState(), 10)[0]
        for batch in batches
    ]
    state, found = LoaderState(), list[Batch]()
    # From the disk and the store in turns, on 1, 2, 4 and 1 ranks.
    for cut, world_size, manifests in (
        (2, 1, remote),
        (3, 2, remote),
        (1, 1, local),
        (2, 4, remote),
        (2, 1, remote),
    ):
        ranks = [
            take(manifests, folder, data, state, cut, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for step in range(cut):
            found += [
                batch
                for round_ in zip(*(steps[step] for steps, _ in ranks), strict=True)
                for batch in round_
            ]
        state = LoaderState.from_json(ranks[-1][1].to_json())
    assert_same(found, whole)
    if cache != "copies ahead":  # else there are as many as there was time for
        assert not list((tmp_path / "cache").rglob("*.tar"))


@pytest.mark.e2e
def test_one_pass_over_a_store(server: HttpServer, folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    passes = []
    for place in (str(folder / "a"), server.url("a")):
        data = settings(cache_dir=str(tmp_path / "cache"))
        passes.append(
            list(
                read_all(
                    load_manifest(place),
                    tokenizer=tokenizer,
                    data=data,
                    image_size=8,
                    context_length=16,
                    micro_batch_size=4,
                )
            )
        )
    assert_same(passes[1], passes[0])
    assert sum(len(batch.keys) for batch in passes[1]) == 23


@pytest.mark.s3
def test_shards_of_a_store_are_read_by_workers(
    s3_server: S3Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    # The fork server must start with this environment, as it does in a run; and this process uses
    # the store first, after which a forked worker would wait for ever.
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
    local = load_manifest(folder / "a")
    remote = load_manifest(s3_server.upload(folder / "a", "loader-test"))
    expected, _ = take([local], folder, settings(), LoaderState(), 4)
    data = settings(workers=2, cache_dir=str(tmp_path / "cache"))
    found, _ = take([remote], folder, data, LoaderState(), 4)
    assert_same(
        [batch for step in found for batch in step], [batch for step in expected for batch in step]
    )
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
