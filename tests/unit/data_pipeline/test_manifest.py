"""Writing, indexing and reading back a folder of shards, and what is said when it does not fit."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.shards.indexing import index_shards
from data_pipeline.shards.manifest import (
    MANIFEST_NAME,
    ShardEntry,
    index_shard,
    load_index,
    load_manifest,
    write_manifest,
)
from data_pipeline.shards.writer import write_shards
from tests.support.s3_server import S3Server
from tests.support.small_shards import caption, make_shards, samples


def test_a_written_folder_reads_back(tmp_path: Path) -> None:
    written = write_shards(samples(20), tmp_path, samples_per_shard=8, about={"licence": "CC0"})
    manifest = load_manifest(tmp_path)
    assert manifest == written == load_manifest(f"file://{tmp_path}/{MANIFEST_NAME}")
    assert [shard.samples for shard in manifest.shards] == [8, 8, 4]
    assert manifest.total_samples == 20
    assert manifest.about == {"licence": "CC0"}
    for shard in manifest.shards:
        data = (tmp_path / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_the_index_agrees_with_tarfile(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=9, samples_per_shard=9)
    shard = manifest.shards[0]
    data, index = (tmp_path / shard.name).read_bytes(), load_index(manifest, shard)
    assert list(index.keys) == [f"{number:05d}" for number in range(9)]
    with tarfile.open(tmp_path / shard.name) as tar:
        infos = tar.getmembers()
    for number, (offset, extent, crc) in enumerate(zip(index.offsets, index.extents, index.crc32, strict=True)):
        png, txt = infos[2 * number], infos[2 * number + 1]
        assert offset == png.offset
        assert offset + extent == txt.offset_data + -(-txt.size // 512) * 512
        assert crc == zlib.crc32(data[offset : offset + extent])
        assert index.members[number] == (("png", png.size), ("txt", len(caption(number))))


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    make_shards(tmp_path / "a", count=5)
    make_shards(tmp_path / "b", count=5)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_webdataset_reads_what_was_written(tmp_path: Path) -> None:
    import webdataset

    make_shards(tmp_path, count=6, samples_per_shard=4)
    found = list(webdataset.WebDataset(
        [str(tmp_path / "shard-000000.tar"), str(tmp_path / "shard-000001.tar")], shardshuffle=False,
    ))  # fmt: skip
    assert [sample["txt"].decode() for sample in found] == [caption(number) for number in range(6)]


@pytest.mark.parametrize("how", ["folder", "wildcard", "braces", "list"])
def test_indexing_the_shards_of_others(tmp_path: Path, how: str) -> None:
    written = make_shards(tmp_path, count=20)
    before = (tmp_path / MANIFEST_NAME).read_bytes()
    for file in tmp_path.glob("*.json"):
        file.unlink()
    given = {
        "folder": str(tmp_path),
        "wildcard": f"{tmp_path}/shard-*.tar",
        "braces": f"{tmp_path}/shard-{{000000..000002}}.tar",
        "list": [f"{tmp_path}/shard-00000{number}.tar" for number in range(3)],
    }[how]
    assert index_shards(given) == written
    assert (tmp_path / MANIFEST_NAME).read_bytes() == before


def test_indexing_sub_folders_and_elsewhere(tmp_path: Path) -> None:
    make_shards(tmp_path / "data" / "one")
    make_shards(tmp_path / "data" / "two")
    manifest = index_shards([f"{tmp_path}/data/one", f"{tmp_path}/data/two"], f"{tmp_path}/data")
    assert manifest.shards[0].name == "one/shard-000000.tar"
    assert load_index(manifest, manifest.shards[-1]).keys
    with pytest.raises(DataError, match=r"does not lie under .*elsewhere"):
        index_shards(f"{tmp_path}/data/one", f"{tmp_path}/elsewhere")
    with pytest.raises(DataError, match="no shards at"):
        index_shards(str(tmp_path))


@pytest.mark.s3
def test_indexing_shards_in_a_store(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    written = make_shards(tmp_path)
    for file in tmp_path.glob("*.json"):
        file.unlink()
    url = s3_server.upload(tmp_path, "index-test")
    for given in (url, f"{url}/shard-{{000000..000005}}.tar"):
        assert index_shards(given).shards == written.shards
        assert load_manifest(url).shards == written.shards
        assert load_index(load_manifest(url), written.shards[5]).keys[0] == "00035"


def tar_of(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    return path


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a.jpg", "b.jpg", "a.txt", "b.txt"], "the key 'a' comes twice"),
     (["a.txt", "a.txt"], "sample 'a' has two files with the same extension"),
     (["README"], "holds no samples")],
)  # fmt: skip
def test_shards_that_are_no_webdataset_shards(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        index_shard(tar_of(tmp_path / "x.tar", names))


def test_a_truncated_shard_is_not_indexed(tmp_path: Path) -> None:
    make_shards(tmp_path, count=3)
    shard = tmp_path / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"shard-000000.tar.*cut off"):
        index_shards(str(tmp_path))


def test_a_missing_manifest_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"no manifest of shards.*`vlmoe data index {tmp_path}`"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 2}, "version 2"), ({"total_samples": 7}, "announces 7 samples"), ({"shards": 3}, "not a manifest"),
     ({"shards": [], "total_samples": 0}, "0 shards")],
)  # fmt: skip
def test_a_manifest_that_contradicts_itself(tmp_path: Path, change: dict[str, object], message: str) -> None:
    make_shards(tmp_path)
    path = tmp_path / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        load_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../x.tar", "/etc/x.tar", "a/../../x.tar", "s3://b/x.tar", ""])
def test_shard_names_stay_in_the_folder(name: str) -> None:
    with pytest.raises(DataError, match="leads out of"):
        ShardEntry(name=name, samples=1, bytes=1, sha256="a" * 64, index="x", index_sha256="a" * 64)


@pytest.mark.parametrize("change", [{"sha256": "../" * 5}, {"index_sha256": "A" * 64}, {"samples": 1.5}, {"bytes": 0}])
def test_an_impossible_shard_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    make_shards(tmp_path)
    path = tmp_path / MANIFEST_NAME
    content = json.loads(path.read_text())
    content["shards"][1] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"manifest.json: shard 'shard-000001.tar' has"):
        load_manifest(tmp_path)


def test_braces_that_do_not_close_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x-\{0..3.tar: its braces do not close"):
        index_shards(f"{tmp_path}/x-{{0..3.tar")


def test_shards_may_be_named_from_here_and_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = make_shards(tmp_path, count=14)
    monkeypatch.chdir(tmp_path)
    found = index_shards([f"{tmp_path}/shard-000000.tar", "shard-000001.tar"])
    assert found.shards == written.shards


def test_a_changed_index_is_refused(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path)
    path = tmp_path / manifest.shards[0].index
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DataError, match=r"index.json has SHA-256 \w+, but the manifest expects"):
        load_index(manifest, manifest.shards[0])


@pytest.mark.parametrize("key", ["a.b", "", "x/", 7])
def test_unusable_keys_are_refused(tmp_path: Path, key: object) -> None:
    with pytest.raises(DataError, match=r"sample key .* is unusable"):
        write_shards([{"__key__": key, "txt": "x"}], tmp_path)
    assert not list(tmp_path.glob("*"))


def test_an_interrupted_rewrite_leaves_no_manifest(tmp_path: Path) -> None:
    make_shards(tmp_path)
    with pytest.raises(DataError, match=r"cannot write sample 'bad': its .png is a object"):
        write_shards([*samples(2), {"__key__": "bad", "png": object()}], tmp_path)
    with pytest.raises(DataError, match="no manifest"):
        load_manifest(tmp_path)


def test_a_manifest_needs_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no samples"):
        write_shards([], tmp_path)
    with pytest.raises(DataError, match="needs shards"):
        write_manifest(tmp_path, [])
