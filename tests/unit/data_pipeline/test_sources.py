"""The fingerprint of a mixture: it depends on everything that determines the order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.loading.sources import Source, data_fingerprint, distinct_names, open_sources
from data_pipeline.order.state import LoaderState
from data_pipeline.settings import SourceConfig
from tests.support.loaders import LoaderFactory, take_steps
from tests.support.small_shards import make_shards


def make_source(folder: Path, count: int, first: int) -> Source:
    manifest = make_shards(folder, count=count, samples_per_shard=4, first=first)
    return Source(manifest=manifest, config=SourceConfig(shards=str(folder)))


def with_weight(source: Source, weight: float) -> Source:
    config = dataclasses.replace(source.config, weight=weight, weight_schedule=())
    return dataclasses.replace(source, config=config)


@pytest.mark.parametrize(
    ("addresses", "names"),
    [
        (["x/a", "y/b", "s3://bucket/c/manifest.json"], ["a", "b", "c"]),
        (["a/train", "b/train/", "b/val"], ["a/train", "b/train", "val"]),
        (["s3://one/x/t", "s3://two/x/t"], ["one/x/t", "two/x/t"]),
        (["t", "x/t", "s3://t"], ["t", "x/t", "t-2"]),
        (["t", "t-2", "t"], ["t", "t-2", "t-3"]),
        (["/", "/"], ["/", "/-2"]),
        (["https://h/t/manifest.json?sig=SECRET", "https://h/t"], ["h/t", "h/t-2"]),
    ],
)
def test_names_are_distinct(addresses: list[str], names: list[str]) -> None:
    assert distinct_names([SourceConfig(shards=address) for address in addresses]) == names


def test_configured_names_are_kept(tmp_path: Path) -> None:
    make_shards(tmp_path / "a" / "t", count=4)
    make_shards(tmp_path / "b" / "t", count=4)
    configs = [
        SourceConfig(shards=str(tmp_path / "a" / "t"), name="t"),
        SourceConfig(shards=str(tmp_path / "b" / "t")),
        SourceConfig(shards=str(tmp_path / "a" / "t"), name="t"),
    ]
    assert [source.name for source in open_sources(configs)] == ["t", "b/t", "t-2"]
    assert [source.name for source in open_sources(configs[1:2])] == ["t"]


def test_fingerprint_of_a_single_source(factory: LoaderFactory) -> None:
    """Weight and repeats do not change it; version 1 of the state has the same one."""
    manifest = factory.manifest
    source = Source(manifest=manifest, config=SourceConfig(shards=manifest.url, repeats=3))
    assert data_fingerprint([manifest], 2) == data_fingerprint([source], 2)

    rows = [[shard.name, shard.samples, shard.sha256] for shard in manifest.shards]
    old = hashlib.sha256(json.dumps([2, rows]).encode()).hexdigest()[:32]
    state = LoaderState.from_json({"version": 1, "position": 8, "seed": 9, "data": old})
    assert take_steps(factory.resume(state), 1)


def test_fingerprints_of_mixtures(tmp_path: Path) -> None:
    a, b, c = (
        make_source(tmp_path / name, count, first)
        for name, count, first in (("a", 17, 0), ("b", 9, 17), ("c", 3, 26))
    )
    schedule = dataclasses.replace(a.config, weight_schedule=((16, 3.0), (64, 1.0)))
    dropped = {0: np.array([1, 2]), 4: np.array([0])}
    a = dataclasses.replace(a, config=schedule, dropped=dropped)
    b, c = with_weight(b, 1.0), with_weight(c, 0.0)

    equal_weights = [with_weight(a, 1.0), with_weight(b, 1.0)]
    mixtures = [
        [a, b, c],
        [b, a, c],
        [a, b],
        equal_weights,
        [with_weight(a, 1.0), with_weight(b, 1.1)],
        [dataclasses.replace(a, dropped={}), b, c],
        [dataclasses.replace(a, dropped={0: np.array([1])}), b, c],
        [a],
        [b],
        [dataclasses.replace(a, dropped={})],
    ]
    fingerprints = {data_fingerprint(sources, window) for sources in mixtures for window in (2, 3)}
    assert len(fingerprints) == 2 * len(mixtures)

    # Only the ratio of the weights matters.
    doubled = [with_weight(a, 2.0), with_weight(b, 2.0)]
    assert data_fingerprint(doubled, 2) == data_fingerprint(equal_weights, 2)
