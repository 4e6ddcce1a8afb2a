"""`vlmoe data index` of corrupt shards, and of archives that are no shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.shards.indexing import index_shards
from data_pipeline.shards.manifest import MANIFEST_NAME, Manifest, load_index, load_manifest
from data_pipeline.shards.scan import index_shard
from tests.support.corruption import truncate
from tests.support.tar_archives import tar_of


def test_all_corrupt_shards_are_listed_and_the_others_indexed(
    tmp_path: Path, written: Manifest, scans: list[str]
) -> None:
    folder = tmp_path / "data"
    truncate(folder / "shard-000000.tar", 3000)
    (folder / "shard-000002.tar").write_bytes(b"<html>not found</html>".ljust(1024, b"x"))
    with pytest.raises(DataError) as error:
        index_shards(str(folder))
    message = str(error.value)
    assert message.startswith("2 of 3 shards cannot be indexed:\n")
    assert "shard-000000.tar: the member at byte" in message
    assert "shard-000002.tar: there is no valid tar header at byte 0" in message
    assert "--salvage" in message
    assert not (folder / MANIFEST_NAME).exists() and (folder / "shard-000001.tar.index").exists()
    scans.clear()
    manifest = index_shards(str(folder), salvage=True)
    assert scans == ["shard-000000.tar", "shard-000002.tar"]
    assert [shard.samples for shard in manifest.shards] == [1, 7, 0]
    assert [bool(shard.corruption) for shard in manifest.shards] == [True, False, True]
    assert load_manifest(folder) == manifest
    assert load_index(manifest, manifest.shards[0]).keys == ["00000"]
    with pytest.raises(DataError, match="2 of 3"):  # salvaged indices are not reused
        index_shards(str(folder))


def test_salvage_continues_after_a_shard_of_0_bytes(tmp_path: Path, written: Manifest) -> None:
    truncate(tmp_path / "data" / "shard-000000.tar", 0)
    manifest = index_shards(str(tmp_path / "data"), salvage=True)
    assert [shard.samples for shard in manifest.shards] == [0, 7, 7]
    assert "ends after 0 bytes" in manifest.shards[0].corruption
    assert load_manifest(tmp_path / "data") == manifest


def test_single_corrupt_or_missing_shard(tmp_path: Path, written: Manifest) -> None:
    truncate(tmp_path / "data" / "shard-000000.tar", 3000)
    with pytest.raises(DataError, match=r"shard-000000.tar.*truncated"):
        index_shards(str(tmp_path / "data" / "shard-000000.tar"))
    with pytest.raises(DataError, match=r"cannot read .*nothing.tar: No such file"):
        index_shards(str(tmp_path / "data" / "nothing.tar"))


def test_stops_early_if_all_shards_fail(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"20 of 500 shards .*\(480 not tried\)"):
        index_shards(f"{tmp_path}/{{000..499}}.tar")


@pytest.mark.parametrize(
    ("names", "message", "salvaged"),
    [
        (["a.jpg", "b.jpg", "a.txt", "b.txt", "c.jpg", "c.txt"], "the key 'a' occurs twice", ["c"]),
        (["a.txt", "a.txt", "b.txt"], "sample 'a' has two files with the same extension", ["b"]),
        (["README", "LICENSE"], r"has 2 files but no samples \(no extension 2\)", []),
    ],
)
def test_archives_that_are_not_webdataset_shards(
    tmp_path: Path, names: list[str], message: str, salvaged: list[str]
) -> None:
    path = tar_of(tmp_path / "x.tar", names)
    with pytest.raises(DataError, match=message):
        index_shard(path)
    assert index_shard(path, salvage=True).keys == salvaged
