"""Drop-lists: what they name never comes, everything else does, and a list of other shards is
refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.order.drop import (
    DropList,
    apply_drop_list,
    dropped_fingerprint,
    make_drop_list,
    read_drop_list,
    write_drop_list,
)
from data_pipeline.order.plan import Plan
from data_pipeline.shards.manifest import Manifest, ShardEntry


def manifest_of(*sizes: int) -> Manifest:
    shards = tuple(
        ShardEntry(
            name=f"s-{n}.tar",
            samples=size,
            bytes=1024,
            sha256=f"{n:064x}",
            index=f"s-{n}.index",
            index_sha256="0" * 64,
        )
        for n, size in enumerate(sizes)
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
def test_exactly_the_rest_comes(window: int, dropped: dict[int, list[int]]) -> None:
    sizes = (5, 3, 8, 1)
    plan = Plan(
        sizes, 3, window, dropped={shard: np.array(gone) for shard, gone in dropped.items()}
    )
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


def test_a_dropped_sample_leaves_no_gap_in_the_order() -> None:
    # The plan is that over as many samples as are left; only the numbers differ.
    smaller, dropped = Plan((4, 3), 1, 2), Plan((6, 3), 1, 2, dropped={0: np.array([0, 3])})
    real = {0: 1, 1: 2, 2: 4, 3: 5}
    expected = [
        ref._replace(sample=real[ref.sample]) if ref.shard == 0 else ref
        for ref in smaller.samples(0, 30)
    ]
    assert dropped.samples(0, 30) == expected


def test_more_than_all_cannot_be_dropped() -> None:
    with pytest.raises(ConfigError, match="a plan needs"):
        Plan((2, 3), 0, 1, dropped={0: np.arange(3)})


def test_a_list_is_written_and_read(tmp_path: Path) -> None:
    manifest = manifest_of(5, 3, 8)
    drop = make_drop_list(manifest, {2: [7, 1, 1], 0: [3], 1: []}, {"made by": 'a "test", {}, '})
    path = tmp_path / "new" / "drop.json"
    write_drop_list(path, drop)
    assert read_drop_list(path) == drop
    assert drop.total_samples == 3
    assert json.loads(path.read_text())["shards"]["s-2.tar"] == {
        "sha256": f"{2:064x}",
        "samples": [1, 7],
    }
    found = apply_drop_list(drop, manifest)
    assert {shard: gone.tolist() for shard, gone in found.items()} == {0: [3], 2: [1, 7]}
    write_drop_list(path, DropList(shards={}))
    assert apply_drop_list(read_drop_list(path), manifest) == {}


def test_a_list_of_other_shards_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    drop = make_drop_list(manifest_of(5, 3), {0: [4], 1: [2]})
    changed = Manifest(
        url="x",
        shards=tuple(
            ShardEntry(**{**vars(shard), "sha256": "f" * 64}) for shard in manifest_of(5, 3).shards
        ),
    )
    with pytest.raises(
        DataError, match=r"was made for another s-0.tar .*its numbers would drop other samples"
    ):
        apply_drop_list(drop, changed)
    with pytest.raises(DataError, match=r"drops sample 4 of s-0.tar, which has 4"):
        apply_drop_list(drop, manifest_of(4, 3))
    others = Manifest(url="x", shards=manifest_of(5, 3, 2).shards[2:])
    with pytest.raises(DataError, match=r"names none of the shards of x"):
        apply_drop_list(drop, others)
    logging.getLogger(
        "data_pipeline"
    ).propagate = True  # a command before may have set up its own logging
    with caplog.at_level(logging.WARNING):
        assert list(apply_drop_list(drop, manifest_of(5))) == [0]
    assert "1 of its 2 shards are not in" in caplog.text


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
def test_another_file_is_no_list(tmp_path: Path, text: str) -> None:
    path = tmp_path / "drop.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"drop.json is not a drop-list"):
        read_drop_list(path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "drop.json"
    path.write_text('{"version": 2, "shards": {}}')
    with pytest.raises(DataError, match=r"version 2, but this program reads version 1"):
        read_drop_list(path)


def test_the_fingerprint_names_what_is_dropped() -> None:
    some = [
        {0: np.array([1, 2])},
        {0: np.array([1])},
        {1: np.array([1, 2])},
        {0: np.array([1]), 1: np.array([2])},
    ]
    names = {dropped_fingerprint(dropped) for dropped in some}
    assert len(names) == len(some)
    assert dropped_fingerprint({}) == ""
    assert dropped_fingerprint({0: np.array([1], dtype=np.int32)}) == dropped_fingerprint(some[1])
