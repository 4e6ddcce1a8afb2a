"""Drop-lists: dropped samples are never read, all others are; lists of other shards are errors."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.order.drop_list import (
    DropList,
    apply_drop_list,
    dropped_fingerprint,
    make_drop_list,
    read_drop_list,
    write_drop_list,
)
from data_pipeline.order.plan import Plan
from data_pipeline.shards.manifest import Manifest, ShardEntry


def make_manifest(*sizes: int) -> Manifest:
    shards = tuple(
        ShardEntry(
            name=f"s-{index}.tar",
            samples=size,
            bytes=1024,
            sha256=f"{index:064x}",
            index=f"s-{index}.index",
            index_sha256="0" * 64,
        )
        for index, size in enumerate(sizes)
    )
    return Manifest(url="shards", shards=shards)


@pytest.mark.parametrize("window", [1, 2, 9])
@pytest.mark.parametrize(
    "dropped",
    [
        {0: [0]},
        {0: [4], 1: [0, 1, 2]},
        {2: [0, 1, 2, 5, 6]},
        {0: [1, 2], 2: [7], 3: [0]},
        {2: [0, 3, 4, 7]},
    ],
)
def test_exactly_the_kept_samples_are_read(window: int, dropped: dict[int, list[int]]) -> None:
    sizes = (5, 3, 8, 1)
    arrays = {shard: np.array(samples) for shard, samples in dropped.items()}
    plan = Plan(sizes, 3, window, dropped=arrays)
    kept = sorted(
        (shard, sample)
        for shard, size in enumerate(sizes)
        for sample in range(size)
        if sample not in dropped.get(shard, [])
    )
    assert plan.samples_per_epoch == len(kept)
    for epoch in range(3):
        refs = plan.samples(epoch * len(kept), len(kept))
        assert sorted((ref.shard, ref.sample) for ref in refs) == kept


def test_dropped_samples_leave_no_gap() -> None:
    """The order is that of a smaller shard; only the sample indices differ."""
    smaller, dropped = Plan((4, 3), 1, 2), Plan((6, 3), 1, 2, dropped={0: np.array([0, 3])})
    index = {0: 1, 1: 2, 2: 4, 3: 5}
    expected = [
        ref._replace(sample=index[ref.sample]) if ref.shard == 0 else ref
        for ref in smaller.samples(0, 30)
    ]
    assert dropped.samples(0, 30) == expected


def test_more_samples_dropped_than_exist() -> None:
    with pytest.raises(ConfigError, match="shards with 2 samples"):
        Plan((2, 3), 0, 1, dropped={0: np.arange(3)})


def test_round_trip(tmp_path: Path) -> None:
    manifest = make_manifest(5, 3, 8)
    drop = make_drop_list(manifest, {2: [7, 1, 1], 0: [3], 1: []}, {"made by": 'a "test", {}, '})
    path = tmp_path / "new" / "drop.json"
    write_drop_list(path, drop)
    assert read_drop_list(path) == drop
    assert drop.total_samples == 3
    content = json.loads(path.read_text())
    assert content["shards"]["s-2.tar"] == {"sha256": f"{2:064x}", "samples": [1, 7]}

    dropped = apply_drop_list(drop, manifest)
    assert {shard: samples.tolist() for shard, samples in dropped.items()} == {0: [3], 2: [1, 7]}

    write_drop_list(path, DropList(shards={}))
    assert apply_drop_list(read_drop_list(path), manifest) == {}


def test_changed_shard_is_an_error() -> None:
    drop = make_drop_list(make_manifest(5, 3), {0: [4], 1: [2]})
    shards = [dataclasses.replace(shard, sha256="f" * 64) for shard in make_manifest(5, 3).shards]
    with pytest.raises(DataError, match=r"s-0.tar \(SHA-256 0000000000000000.*ffffffffffffffff"):
        apply_drop_list(drop, Manifest(url="x", shards=tuple(shards)))


def test_sample_out_of_range_is_an_error() -> None:
    drop = make_drop_list(make_manifest(5, 3), {0: [4], 1: [2]})
    with pytest.raises(DataError, match=r"sample 4 of s-0.tar, which has only 4"):
        apply_drop_list(drop, make_manifest(4, 3))


def test_unknown_shards(caplog: pytest.LogCaptureFixture) -> None:
    """A warning if some shards are not in the manifest, an error if none is."""
    drop = make_drop_list(make_manifest(5, 3), {0: [4], 1: [2]})
    others = Manifest(url="x", shards=make_manifest(5, 3, 2).shards[2:])
    with pytest.raises(DataError, match=r"none of the shards of x"):
        apply_drop_list(drop, others)

    # A command of an earlier test may have configured logging.
    logging.getLogger("data_pipeline").propagate = True
    with caplog.at_level(logging.WARNING):
        assert list(apply_drop_list(drop, make_manifest(5))) == [0]
    assert "1 of its 2 shards" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"version": 1}',
        '{"version": 1, "shards": {"a": {"samples": [1]}}}',
        '{"version": 1, "shards": {"a": {"sha256": "x", "samples": [-1]}}}',
        '{"version": 1, "shards": {"a": {"sha256": "x", "samples": ["1"]}}}',
        '{"version": 1, "shards": {"a": {"sha256": 7, "samples": []}}}',
        '{"version": 1, "shards": 7}',
    ],
)
def test_invalid_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "drop.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"drop.json is not a drop-list"):
        read_drop_list(path)


def test_unknown_version(tmp_path: Path) -> None:
    path = tmp_path / "drop.json"
    path.write_text('{"version": 2, "shards": {}}')
    with pytest.raises(DataError, match=r"version 2.* version 1"):
        read_drop_list(path)


def test_fingerprint() -> None:
    dropped = [
        {0: np.array([1, 2])},
        {0: np.array([1])},
        {1: np.array([1, 2])},
        {0: np.array([1]), 1: np.array([2])},
    ]
    fingerprints = [dropped_fingerprint(samples) for samples in dropped]
    assert len(set(fingerprints)) == len(dropped)
    assert dropped_fingerprint({}) == ""
    assert dropped_fingerprint({0: np.array([1], dtype=np.int32)}) == fingerprints[1]
